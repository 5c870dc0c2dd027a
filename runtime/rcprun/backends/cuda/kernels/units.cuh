// How linear layers lie in GPU memory: units of 16 rows x 128 columns, and a unit's codes as int8 levels.
//
// A unit: 512 bytes of codes, 16 for each lane (g = lane / 4, t = lane % 4): words of row g, g + 8, g, g + 8, the first two
// of columns [32 t, 32 t + 16), the others of the next 16. In each half word, column i of its 8 is at bits 4i and column
// 4 + i at bits 4i + 2. Then the levels, 8 bytes (rows g and g + 8) for each g and group of GROUP columns.
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
