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

// PTX itself: __byte_perm would mask the selectors once more, and plain shifts would be undone by the compiler, which
// prefers to mask and shift each half by itself. Either costs a fifth of the loop.
__device__ __forceinline__ u32 upper_half(u32 x) {
    u32 y;
    asm("shr.u32 %0, %1, 16;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ u32 look_up(u32 levels, u32 selectors) {
    u32 y;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(levels), "r"(selectors));
    return y;
}
