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

#include "planes_in.cuh"
#include "stream.cuh"

#if TOKENS != 1 || A_BITS != 4 || GROUP != 128
#error "by_planes.cuh: one token, 4-bit activations, groups of 128"
#endif

__device__ __forceinline__ u32 low_bits(u32 first, u32 second) { return select_bits(0x55555555u, first, second * 2); }
__device__ __forceinline__ u32 high_bits(u32 first, u32 second) { return select_bits(0x55555555u, first >> 1, second); }

struct Product {
    u32 plane, total, at_plane, at_total, first_unit, second_unit, code, level;
    int odd_weight, sum[2];

    // planes: as planes_in.cuh leaves them.
    __device__ __forceinline__ void prepare(const u8* planes, int units) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        plane = shared_address(planes) + (g >> 2) * 64 + t * 16 + (g & 3) * 4;
        total = shared_address(planes + units * 64) + (t >> 1) * 8 + (t & 1) * 4;
        first_unit = kept(g < 4), second_unit = kept(g >= 4);
        code = kept(lane * 16), level = kept((t >> 1) * UNIT_BYTES + CODE_BYTES + g * 8);
        odd_weight = (int)kept(t & 1 ? -2 : 2);
        sum[0] = sum[1] = 0;
    }
    // The next stage is this one of its tile.
    __device__ __forceinline__ void seek(int stage) { at_plane = plane + stage * 128, at_total = total + stage * 16; }

    // Add two units, which lie in shared memory.
    __device__ __forceinline__ void add(u32 data) {
        const uint4 code0 = load4(data + code), code1 = load4(data + code + UNIT_BYTES);
        const uint2 levels = load2(data + level);
        const u32 bits = load1(at_plane), b0 = bits * first_unit, b1 = bits * second_unit;
        const int all = (int)load1(at_total);
        at_plane += 128, at_total += 16;
        const u32 l0 = low_bits(code0.x, code0.z), l1 = low_bits(code0.y, code0.w);
        const u32 l2 = low_bits(code1.x, code1.z), l3 = low_bits(code1.y, code1.w);
        const u32 h0 = high_bits(code0.x, code0.z), h1 = high_bits(code0.y, code0.w);
        const u32 h2 = high_bits(code1.x, code1.z), h3 = high_bits(code1.y, code1.w);
        // x, y: row g, even and odd plane; z, w: row g + 8.
        const int4 low = mma_bits(l0, l1, l2, l3, b0, b1), high = mma_bits(h0, h1, h2, h3, b0, b1);
        const int4 both = mma_bits(l0 & h0, l1 & h1, l2 & h2, l3 & h3, b0, b1);
        add_row(sum[0], low.x + odd_weight * low.y, high.x + odd_weight * high.y, both.x + odd_weight * both.y, all, levels.x);
        add_row(sum[1], low.z + odd_weight * low.w, high.z + odd_weight * high.w, both.z + odd_weight * both.w, all, levels.y);
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
