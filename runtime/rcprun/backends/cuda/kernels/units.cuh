// How linear layers lie in GPU memory: units of 16 rows x 128 columns, a unit's codes as int8 levels, and their order.
//
// A unit: 512 bytes of codes, 16 for each lane (g = lane / 4, t = lane % 4): words of row g, g + 8, g, g + 8, the first two
// of columns [32 t, 32 t + 16), the others of the next 16. In each half word, column i of its 8 is at bits 4i and column
// 4 + i at bits 4i + 2. Then the levels, 8 bytes (rows g and g + 8) for each g and group of GROUP columns.
//
// Two neighbouring units of a tile are a stage. A layer's tiles are cut into as many shares as linear.cu has blocks, a
// share's stages, tile by tile, into STREAMS parts, one for each of the block's warps; in memory lie the first stages of
// all parts, then the second ones, and so on, so that a block fetches what its warps need next as one piece.
#pragma once

#include "common.cuh"

#ifndef GROUP
#error "GROUP: weights that share levels, 64 or 128"
#endif

#define CODE_BYTES 512
#define UNIT_BYTES (CODE_BYTES + 64 * (128 / GROUP))

// Where in a unit a lane's two words of levels are.
__device__ __forceinline__ int levels_of_lane(int lane) {
    const int g = lane >> 2, t = lane & 3;
    return CODE_BYTES + (GROUP == 128 ? g : 2 * g + (t >> 1)) * 8;
}

#define STAGE_UNITS 2
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)
#define STREAMS 16

// The tiles of one block: `more` blocks have one more than the others.
struct Share {
    int first, owned;

    __device__ __forceinline__ Share(int block, int blocks, int tiles) {
        const u32 least = (u32)tiles / blocks, more = (u32)tiles - least * blocks;
        first = block * least + min(block, (int)more), owned = least + (block < more);
    }
};
// The stages of one warp of a block, tile by tile: `more` warps have one more than the others.
struct Part {
    int first, count, least, more;

    __device__ __forceinline__ Part(int stream, int stages) {
        least = stages / STREAMS, more = stages % STREAMS;
        first = stream * least + min(stream, more), count = least + (stream < more);
    }
};
// Where a stage of a tile is among all stages. stages: of a tile.
__device__ __forceinline__ i64 stage_place(int tile, int stage, int tiles, int stages, int blocks) {
    const int least = tiles / blocks, more = tiles - least * blocks, larger = more * (least + 1);
    const int block = tile < larger ? tile / (least + 1) : more + (tile - larger) / least;
    const Share share(block, blocks, tiles);
    const int index = (tile - share.first) * stages + stage;
    const Part whole(0, share.owned * stages);
    const int in_larger = whole.more * (whole.least + 1);
    const int stream = index < in_larger ? index / (whole.least + 1) : whole.more + (index - in_larger) / whole.least;
    const Part part(stream, share.owned * stages);
    return (i64)share.first * stages + (i64)(index - part.first) * STREAMS + stream;
}
