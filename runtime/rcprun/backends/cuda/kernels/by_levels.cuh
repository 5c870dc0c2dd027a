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
    u32 mine, step, at;  // this lane's codes: of the tile's first stage, from unit to unit, of the next stage
    u32 code, level;  // where the lane's codes and levels are in a unit
    int tokens, even[4], odd[4];

    // code_MK: rows of `stride` bytes in shared memory. zeros: 32 bytes.
    __device__ __forceinline__ void prepare(const i8* code_MK, int stride, int m, const u8* zeros) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        // Lanes of a token that is not there read zeros, again and again.
        mine = g < m ? shared_address(code_MK) + g * stride + t * 32 : shared_address(zeros);
        step = g < m ? 128 : 0;
        tokens = m;
        code = kept(lane * 16), level = kept(levels_of_lane(lane));
#pragma unroll
        for (int i = 0; i < 4; ++i) even[i] = odd[i] = 0;
    }
    // The next stage is this one of its tile.
    __device__ __forceinline__ void seek(int stage) { at = mine + stage * STAGE_UNITS * step; }

    // Add two units, which lie in shared memory.
    __device__ __forceinline__ void add(u32 data) {
        const u32 next = at + step;
        const uint4 code0 = load4(data + code);
        const uint2 level0 = load2(data + level);
        const uint4 b0 = load4(at), b1 = load4(at + 16);
        const uint4 code1 = load4(data + code + UNIT_BYTES);
        const uint2 level1 = load2(data + level + UNIT_BYTES);
        const uint4 b2 = load4(next), b3 = load4(next + 16);
        at = next + step;
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
            if (token < tokens) atomicAdd(sums + (g + (i >> 1) * 8) * TOKENS + token, even[i] + odd[i]);
            even[i] = odd[i] = 0;
        }
    }
};
