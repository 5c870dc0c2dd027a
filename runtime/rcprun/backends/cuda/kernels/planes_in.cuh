// The activations of one token of 4 bits to bit planes in shared memory, for by_planes.cuh.
//
// A chunk is 32 columns; bit 4 n + r of its plane j is bit j of the code of column 16 (r % 2) + 8 (n / 4) + 4 (r / 2) + n % 4:
// so the codes of a word of weights lie (units.cuh). Eight codes of one r, as the nibbles n of a word, are a part of
// the chunk; four parts become four planes as a matrix of bits is transposed.
#pragma once

#include "measured.cuh"

// Row r of a 4 x 4 transposition of bits within nibbles, in registers.
__device__ __forceinline__ void transpose_bits(u32 (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 a = v[i], b = v[i + 1];
        v[i] = (a & 0x55555555u) | ((b << 1) & 0xaaaaaaaau), v[i + 1] = ((a >> 1) & 0x55555555u) | (b & 0xaaaaaaaau);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 a = v[i], b = v[i + 2];
        v[i] = (a & 0x33333333u) | ((b << 2) & 0xccccccccu), v[i + 2] = ((a >> 2) & 0x33333333u) | (b & 0xccccccccu);
    }
}
// The same of four neighbouring lanes, which hold a row each.
__device__ __forceinline__ u32 transpose_bits(u32 v) {
    const u32 other = __shfl_xor_sync(FULL_MASK, v, 1);
    v = threadIdx.x & 1 ? ((other >> 1) & 0x55555555u) | (v & 0xaaaaaaaau) : (v & 0x55555555u) | ((other << 1) & 0xaaaaaaaau);
    const u32 far = __shfl_xor_sync(FULL_MASK, v, 2);
    return threadIdx.x & 2 ? ((far >> 2) & 0x33333333u) | (v & 0xccccccccu) : (v & 0x33333333u) | ((far << 2) & 0xccccccccu);
}
// The low nibbles of four bytes, in bytes 0 and 2.
__device__ __forceinline__ u32 nibbles(u32 bytes) {
    const u32 low = bytes & 0x0f0f0f0fu;
    return low | (low >> 4);
}
// A plane of a chunk as by_planes.cuh wants it: the codes of the first words of weights at even bits, those of the second
// ones; both again at odd bits.
__device__ __forceinline__ uint4 spread(u32 plane) {
    const u32 first = plane & 0x55555555u, second = (plane >> 1) & 0x55555555u;
    return {first, second, first * 2, second * 2};
}

#define PLANE_BYTES (UNITS * 256)  // of planes, uint4 [UNITS][4 chunks][4]
#define TOTAL_BYTES (UNITS * 16)   // of how many of their bits are set, u32 [UNITS / 2][4][2 units]

// Planes and totals of the token to `planes`, and its scale; by all that compute, who need a barrier after it.
__device__ __forceinline__ void planes_in(const void* x, const float* x_scale_M, float clip, float eps, u8* planes,
                                          float* scale_M, float* scratch) {
    uint4* const plane_UC4 = (uint4*)planes;
    u32* const total = (u32*)(planes + PLANE_BYTES);
    auto place = [](int unit, int plane) { return ((unit >> 1) * 4 + plane) * 2 + (unit & 1); };
    constexpr int THREADS_IN = WARPS * 32;
#if PROLOGUE == 0
    constexpr int CHUNKS = UNITS * 4;
#pragma unroll
    for (int first = 0; first < CHUNKS; first += THREADS_IN) {
        const int chunk = first + threadIdx.x;
        if (first + (threadIdx.x & ~31) >= CHUNKS) break;
        const bool there = CHUNKS % 32 == 0 || chunk < CHUNKS;
        const uint4* const from = (const uint4*)x + (there ? chunk : 0) * 2;
        const uint4 a = __ldcg(from), b = __ldcg(from + 1);
        u32 part[4] = {__byte_perm(nibbles(a.x), nibbles(a.z), 0x6420), __byte_perm(nibbles(b.x), nibbles(b.z), 0x6420),
                       __byte_perm(nibbles(a.y), nibbles(a.w), 0x6420), __byte_perm(nibbles(b.y), nibbles(b.w), 0x6420)};
        transpose_bits(part);
        u32 counts = __popc(part[0]) | __popc(part[1]) << 8 | __popc(part[2]) << 16 | __popc(part[3]) << 24;
        counts += __shfl_xor_sync(FULL_MASK, counts, 1);
        counts += __shfl_xor_sync(FULL_MASK, counts, 2);
        if (!there) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) plane_UC4[chunk * 4 + j] = spread(part[j]);
        total[place(chunk >> 2, chunk & 3)] = counts >> 8 * (chunk & 3) & 255;
    }
    if (threadIdx.x == 0) scale_M[0] = __ldcg(x_scale_M);
#else
    // A thread takes a part of a chunk at a time, and keeps the first HELD in registers.
    constexpr int PARTS = UNITS * 16, TURNS = (PARTS + THREADS_IN - 1) / THREADS_IN, HELD = TURNS < 3 ? TURNS : 3;
    const float* const row = (const float*)x;
    const int r = threadIdx.x & 3, offset = 16 * (r & 1) + 4 * (r >> 1);
    auto there = [&](int turn) { return PARTS % THREADS_IN == 0 || turn * THREADS_IN + (threadIdx.x & ~31) < PARTS; };  // whole warps
    auto column = [&](int turn) { return ((turn * THREADS_IN + threadIdx.x) >> 2) * 32 + offset; };
    Measured measured;
    float4 held[HELD][2];
#pragma unroll
    for (int j = 0; j < HELD; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) held[j][half] = load_columns(row, there(j) ? column(j) + 8 * half : CHANNELS);
#pragma unroll
    for (int j = 0; j < HELD; ++j) measured.add(held[j][0]), measured.add(held[j][1]);
    for (int j = HELD; j < TURNS; ++j)
        for (int half = 0; half < 2; ++half) measured.add(load_columns(row, there(j) ? column(j) + 8 * half : CHANNELS));
    measured.finish(scratch, clip, eps);
    if (threadIdx.x == 0) scale_M[0] = measured.token.scale;
    auto store = [&](int turn, float4 first, float4 second) {
        const int part = turn * THREADS_IN + threadIdx.x;
        const u32 low = nibbles(measured.four_codes(first)), high = nibbles(measured.four_codes(second));
        const u32 plane = transpose_bits(__byte_perm(low, high, 0x6420));
        u32 count = __popc(plane);
        count += __shfl_xor_sync(FULL_MASK, count, 4);
        count += __shfl_xor_sync(FULL_MASK, count, 8);
        plane_UC4[part] = spread(plane);
        if ((part & 12) == 0) total[place(part >> 4, part & 3)] = count;
    };
#pragma unroll
    for (int j = 0; j < HELD; ++j)
        if (there(j)) store(j, held[j][0], held[j][1]);
    for (int j = HELD; j < TURNS; ++j)
        if (there(j)) store(j, load_columns(row, column(j)), load_columns(row, column(j) + 8));
#endif
}
