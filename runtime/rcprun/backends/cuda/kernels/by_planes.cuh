// Sums of one token with 4-bit activations, by bit planes: half the instructions of by_levels.cuh.
//
// Of a row and a group, let N_c be the sum of the activations whose code is c; the row's sum is then the sum of
// level_c * N_c over c and the groups. With the activations in four planes (weights 1, 2, 4, -8), mma.m16n8k256 counts
// the bits that a plane shares with the low bits of the codes, with their high bits, and with both: N_1, N_2 and N_3 follow,
// N_0 is what is left of the sum of all. A product takes two units. Its columns 0-3 are the planes over the first, 4-7
// over the second, each zero over the other; so a lane (t = lane % 4) ends up with two planes of unit t / 2: planes 0 and
// 1 where t is even, 2 and 3 where it is odd, the latter counted as 1 and -2 until the end.
// The order of columns is free as long as both operands agree: bit 2p of a word is code p of the first word of a row in
// its unit (units.cuh), bit 2p + 1 is code p of the second.
#pragma once

#include "stream.cuh"

#if TOKENS != 1 || A_BITS != 4 || GROUP != 128
#error "by_planes.cuh: one token, 4-bit activations, groups of 128"
#endif

__device__ __forceinline__ u32 low_bits(u32 first, u32 second) { return (first & 0x55555555u) | ((second << 1) & 0xaaaaaaaau); }
__device__ __forceinline__ u32 high_bits(u32 first, u32 second) { return ((first >> 1) & 0x55555555u) | (second & 0xaaaaaaaau); }

struct Product {
    u32 planes, totals, at_planes, at_totals, first_unit, level;
    int odd_weight, sum[2];

    // code_MK: in shared memory. scratch, 72 bytes a unit: planes u32 [units][4 lanes t][4], then totals i32 [units][2], of
    // planes 0 and 1, and of planes 2 and 3. Whole block, with a barrier after it.
    __device__ __forceinline__ void prepare(const i8* code_MK, int stride, int m, int units, u8* scratch) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        u32* const plane_U = (u32*)scratch;
        int* const total_U = (int*)(scratch + units * 64);
        const int p = lane >> 1, column = (lane & 1) * 16 + (p >> 3) * 8 + (p & 1) * 4 + ((p & 7) >> 1);  // of bit `lane`
        for (int unit = warp; unit < units; unit += blockDim.x >> 5) {
            int low = 0, high = 0;
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const int code = code_MK[unit * 128 + part * 32 + column];
                u32 word[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) word[j] = __ballot_sync(FULL_MASK, (code >> j) & 1);
                low += __popc(word[0]) + 2 * __popc(word[1]);
                high += __popc(word[2]) - 2 * __popc(word[3]);
                if (lane == 0) *(uint4*)(plane_U + (unit * 4 + part) * 4) = make_uint4(word[0], word[1], word[2], word[3]);
            }
            if (lane == 0) *(int2*)(total_U + unit * 2) = make_int2(low, high);
        }
        planes = shared_address(plane_U) + (g >> 2) * 64 + t * 16 + (g & 3) * 4;
        totals = shared_address(total_U) + t * 4;
        first_unit = g < 4 ? 0xffffffffu : 0;
        level = (t >> 1) * UNIT_BYTES + CODE_BYTES + g * 8;
        odd_weight = t & 1 ? -2 : 2;
        sum[0] = sum[1] = 0;
    }
    // The next stage is this one of its tile.
    __device__ __forceinline__ void seek(int stage) { at_planes = planes + stage * 128, at_totals = totals + stage * 16; }

    // Add two units, which lie in shared memory.
    __device__ __forceinline__ void add(u32 data) {
        const u32 code = data + (threadIdx.x & 31) * 16;
        const uint4 code0 = load4(code), code1 = load4(code + UNIT_BYTES);
        const uint2 levels = load2(data + level);
        const u32 plane = load1(at_planes), b0 = plane & first_unit, b1 = plane & ~first_unit;
        const int total = (int)load1(at_totals);
        at_planes += 128, at_totals += 16;
        const u32 l0 = low_bits(code0.x, code0.z), l1 = low_bits(code0.y, code0.w);
        const u32 l2 = low_bits(code1.x, code1.z), l3 = low_bits(code1.y, code1.w);
        const u32 h0 = high_bits(code0.x, code0.z), h1 = high_bits(code0.y, code0.w);
        const u32 h2 = high_bits(code1.x, code1.z), h3 = high_bits(code1.y, code1.w);
        // x, y: row g, even and odd plane; z, w: row g + 8.
        const int4 low = mma_bits(l0, l1, l2, l3, b0, b1), high = mma_bits(h0, h1, h2, h3, b0, b1);
        const int4 both = mma_bits(l0 & h0, l1 & h1, l2 & h2, l3 & h3, b0, b1);
        add_row(sum[0], low.x + odd_weight * low.y, high.x + odd_weight * high.y, both.x + odd_weight * both.y, total, levels.x);
        add_row(sum[1], low.z + odd_weight * low.w, high.z + odd_weight * high.w, both.z + odd_weight * both.w, total, levels.y);
    }
    // The sums of activations with the low bit set, with the high bit, with both, and of all.
    static __device__ __forceinline__ void add_row(int& sum, int low, int high, int both, int total, u32 levels) {
        const int n2 = high - both, n1 = low - both, n0 = total - low - n2;
        sum = dot_low(__byte_perm(n0, n1, 0x5410), levels, sum);
        sum = dot_high(__byte_perm(n2, both, 0x5410), levels, sum);
    }
    // Add what there is to the sums [16] of the tile, and begin anew.
    __device__ __forceinline__ void flush(int* sums) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int s = t & 1 ? 4 * sum[i] : sum[i];
            s += __shfl_xor_sync(FULL_MASK, s, 1);
            s += __shfl_xor_sync(FULL_MASK, s, 2);
            if (t == 0) atomicAdd(sums + g + 8 * i, s);
            sum[i] = 0;
        }
    }
};
