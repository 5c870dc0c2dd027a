// Sums of one token with 4-bit activations, by bit planes.
//
// Of a row and a group, let N_c be the sum of the activations whose code is c; the row's sum is then the sum of
// level_c * N_c over c and the groups. With the activations in four planes (weights 1, 2, 4, -8), whose weights wait until the
// end, N_c is how many bits of a plane are set where the code is c. mma.m16n8k256 counts such bits. Its A operand is
// the words of weights as they lie (units.cuh: the codes' low bits are at even places, their high ones at odd places), or what
// two neighbouring bits share; its column 2 j is plane j at even places, 2 j + 1 the same at odd ones. So lane t = lane % 4
// gets, of its plane t, the counts of codes with the low bit, with the high bit, and with both; from these four counts in
// the bytes of a word, times the four levels.
#pragma once

#include "planes_in.cuh"
#include "stream.cuh"

#if TOKENS != 1 || A_BITS != 4 || GROUP != 128
#error "by_planes.cuh: one token, 4-bit activations, groups of 128"
#endif

struct Product {
    u32 plane, total, at_plane, at_total;
    int sum[2];  // of the lane's plane, rows g and g + 8

    u32 code, level;  // where the lane's codes and levels are in a stage

    // planes: as planes_in.cuh leaves them.
    __device__ __forceinline__ void prepare(const u8* planes) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        plane = kept(shared_address(planes) + t * 64 + g * 8);
        total = kept(shared_address(planes + PLANE_BYTES) + t * 8);
        code = kept(lane * 16), level = kept(CODE_BYTES + g * 8);
        sum[0] = sum[1] = 0;
    }
    // The next stage is this one of its tile.
    __device__ __forceinline__ void seek(int stage) { at_plane = stage * STAGE_UNITS * 256, at_total = stage * 32; }

    // Add two units, which lie in shared memory.
    __device__ __forceinline__ void add(u32 data) {
        const uint4 code0 = load4(data + code), code1 = load4(data + code + UNIT_BYTES);
        const uint2 level0 = load2(data + level), level1 = load2(data + level + UNIT_BYTES);
        const uint2 b0 = load2(plane + at_plane), b1 = load2(plane + at_plane + 256), totals = load2(total + at_total);
        at_plane += STAGE_UNITS * 256, at_total += 32;
        add_unit(code0, level0, b0, totals.x);
        add_unit(code1, level1, b1, totals.y);
    }
    // Column 2 j of b: plane j over the low bits of the codes a; 2 j + 1: over their high bits.
    __device__ __forceinline__ void add_unit(uint4 a, uint2 level, uint2 b, u32 total) {
        // x, y: row g, low and high bit; z, w: row g + 8.
        const int4 one = mma_bits(a.x, a.y, a.z, a.w, b.x, b.y);
        const int4 both = mma_bits(a.x & a.x >> 1, a.y & a.y >> 1, a.z & a.z >> 1, a.w & a.w >> 1, b.x, b.y);
        sum[0] = dot(counts(one.x, one.y, both.x, total), level.x, sum[0]);
        sum[1] = dot(counts(one.z, one.w, both.z, total), level.y, sum[1]);
    }
    // The counts of the codes 0 to 3, one a byte: total - low - high + both, low - both, high - both, both.
    static __device__ __forceinline__ u32 counts(u32 low, u32 high, u32 both, u32 total) {
        return both * (0x1000000u - 0x10000u - 0x100u + 1) + (high * (0x10000u - 1) + (low * (0x100u - 1) + total));
    }
    // Add what there is to the sums [16] of the tile, and begin anew.
    __device__ __forceinline__ void flush(int* sums) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, weight = t == 3 ? -8 : 1 << t;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int s = weight * sum[i];
            s += __shfl_xor_sync(FULL_MASK, s, 1);
            s += __shfl_xor_sync(FULL_MASK, s, 2);
            if (t == 0) atomicAdd(sums + g + 8 * i, s);
            sum[i] = 0;
        }
    }
};
