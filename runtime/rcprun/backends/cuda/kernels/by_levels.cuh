// Sums of 1 to 8 tokens: codes become int8 levels by byte permutation, which mma.m16n8k32 multiplies.
//
// A lane (g = lane / 4, t = lane % 4) holds the codes of rows g and g + 8 for columns [32 t, 32 t + 32) of a unit. They are
// the A operand, whose order of columns is free as long as B agrees: B is 32 contiguous bytes of the token n = lane / 4.
#pragma once

#include "codes_in.cuh"
#include "stream.cuh"

// 16 columns (two products' worth) of rows g and g + 8: 16 codes a word, even ones at bits 4i, odd ones at 4i + 2.
__device__ __forceinline__ void multiply(int (&sum)[4], u32 low, u32 high, uint2 level, u32 b0, u32 b1, u32 b2, u32 b3) {
    const u32 mask = 0x33333333u;
    const u32 even_low = low & mask, odd_low = (low >> 2) & mask, even_high = high & mask, odd_high = (high >> 2) & mask;
    mma(sum, look_up(level.x, even_low), look_up(level.y, even_high), look_up(level.x, odd_low), look_up(level.y, odd_high),
        b0, b1);
    mma(sum, look_up(level.x, upper_half(even_low)), look_up(level.y, upper_half(even_high)),
        look_up(level.x, upper_half(odd_low)), look_up(level.y, upper_half(odd_high)), b2, b3);
}

struct Product {
    u32 mine, at;     // this lane's activations, and how far those of the next stage are from there
    u32 code, level;  // where the lane's codes and levels are in a unit
    int even[4], odd[4];

    // code_MK: rows of CODE_STRIDE bytes in shared memory.
    __device__ __forceinline__ void prepare(const i8* code_MK, int m) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        mine = kept(shared_address(code_MK) + min(g, m - 1) * CODE_STRIDE + t * 32);  // sums of no token go nowhere
        code = kept(lane * 16), level = kept(levels_of_lane(lane));
#pragma unroll
        for (int i = 0; i < 4; ++i) even[i] = odd[i] = 0;
    }
    // The next stage is this one of its tile.
    __device__ __forceinline__ void seek(int stage) { at = stage * STAGE_UNITS * 128; }

    // Add two units, which lie in shared memory.
    __device__ __forceinline__ void add(u32 data) {
        const uint4 code0 = load4(data + code), code1 = load4(data + code + UNIT_BYTES);
        const uint2 level0 = load2(data + level), level1 = load2(data + level + UNIT_BYTES);
        const uint4 b0 = load4(mine + at), b1 = load4(mine + at + 16), b2 = load4(mine + at + 128), b3 = load4(mine + at + 144);
        at += STAGE_UNITS * 128;
        multiply(even, code0.x, code0.y, level0, b0.x, b0.y, b0.z, b0.w);
        multiply(odd, code1.x, code1.y, level1, b2.x, b2.y, b2.z, b2.w);
        multiply(even, code0.z, code0.w, level0, b1.x, b1.y, b1.z, b1.w);
        multiply(odd, code1.z, code1.w, level1, b3.x, b3.y, b3.z, b3.w);
    }
    // Add what there is to the sums [16][TOKENS] of the tile, and begin anew.
    __device__ __forceinline__ void flush(int* sums) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = 2 * t + (i & 1);
            if (token < TOKENS) atomicAdd(sums + (g + (i >> 1) * 8) * TOKENS + token, even[i] + odd[i]);
            even[i] = odd[i] = 0;
        }
    }
};
