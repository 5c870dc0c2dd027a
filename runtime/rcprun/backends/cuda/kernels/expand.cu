// Units of a linear layer to plain int8, for products with many tokens by cuBLAS.
//
//   unit_TU     u8 [tiles][units][UNIT_BYTES], in the order of units.cuh
//   integer_RK  i8 [tiles * 16][units * 128], written
//
//   blocks      of linear.cu, which the order depends on
//
// Grid: tiles * ceil(units / (WARPS * TURNS)) blocks of 32 * WARPS threads. A warp expands a stage, which it reads before
// it waits for what else uses the buffer.

#include "units.cuh"

constexpr int WARPS = 8, TURNS = STAGE_UNITS;

__device__ __forceinline__ uint4 sixteen(u32 word, u32 levels) {
    const u32 even = word & 0x33333333u, odd = (word >> 2) & 0x33333333u;
    return make_uint4(look_up(levels, even), look_up(levels, odd), look_up(levels, upper_half(even)),
                      look_up(levels, upper_half(odd)));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) expand(const u8* unit_TU, i8* integer_RK, int tiles, int units, int blocks) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int parts = (units + WARPS * TURNS - 1) / (WARPS * TURNS);
    const int tile = blockIdx.x / parts, first = (blockIdx.x % parts * WARPS + warp) * TURNS;
    const int stages = units / STAGE_UNITS, stage = min(first / STAGE_UNITS, stages - 1);
    const u8* const from = unit_TU + stage_place(tile, stage, tiles, stages, blocks) * STAGE_BYTES;
    uint4 code[TURNS] = {};
    uint2 level[TURNS] = {};
#pragma unroll
    for (int i = 0; i < TURNS; ++i)
        if (first + i < units) {
            code[i] = load_once(from + i * UNIT_BYTES + lane * 16);
            level[i] = *(const uint2*)(from + i * UNIT_BYTES + levels_of_lane(lane));
        }
    pdl_launch();
    pdl_wait();
    // A lane holds 32 columns of its rows. Neighbours swap halves, so that each store of a pair fills 32 bytes in a row:
    // of 64 columns in quarters, the lane with even t gets 0 and 2, the other 1 and 3.
    const bool odd = lane & 1;
    const i64 columns = (i64)units * 128;
    i8* const low = integer_RK + (tile * 16 + g) * columns + first * 128 + (t >> 1) * 64 + odd * 16;
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        const u32 swapped_low = __shfl_xor_sync(FULL_MASK, odd ? code[i].x : code[i].z, 1);
        const u32 swapped_high = __shfl_xor_sync(FULL_MASK, odd ? code[i].y : code[i].w, 1);
        if (first + i >= units) break;
        i8* const to = low + i * 128;
        i8* const to_high = to + 8 * columns;
        *(uint4*)to = sixteen(odd ? swapped_low : code[i].x, level[i].x);
        *(uint4*)(to + 32) = sixteen(odd ? code[i].z : swapped_low, level[i].x);
        *(uint4*)to_high = sixteen(odd ? swapped_high : code[i].y, level[i].y);
        *(uint4*)(to_high + 32) = sixteen(odd ? code[i].w : swapped_high, level[i].y);
    }
}
