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

// Planes u32 [units][4 chunks][4] to `planes` and, after them, the sums of the units' codes i32 [units][2] (the second
// is 0); the token's scale. Whole block, which needs a barrier after it.
__device__ __forceinline__ void planes_in(const void* x, const float* x_scale_M, int k, int units, float clip, float eps,
                                          u8* planes, float* scale_M, float* scratch) {
    int2* const sum_U = (int2*)(planes + units * 64);
#if PROLOGUE == 0
    const int chunks = units * 4;
    const uint4* const from = (const uint4*)x;
    for (int chunk = threadIdx.x; chunk < ((chunks + 31) & ~31); chunk += WARPS * 32) {
        uint4 a = {0, 0, 0, 0}, b = a;
        if (chunk < chunks) a = __ldcg(from + chunk * 2), b = __ldcg(from + chunk * 2 + 1);
        u32 part[4] = {__byte_perm(nibbles(a.x), nibbles(a.z), 0x6420), __byte_perm(nibbles(b.x), nibbles(b.z), 0x6420),
                       __byte_perm(nibbles(a.y), nibbles(a.w), 0x6420), __byte_perm(nibbles(b.y), nibbles(b.w), 0x6420)};
        int sum = add_bytes(a.x, add_bytes(a.y, add_bytes(a.z, add_bytes(a.w, 0))));
        sum = add_bytes(b.x, add_bytes(b.y, add_bytes(b.z, add_bytes(b.w, sum))));
        sum += __shfl_xor_sync(FULL_MASK, sum, 1);
        sum += __shfl_xor_sync(FULL_MASK, sum, 2);
        transpose_bits(part);
        if (chunk < chunks) {
            *(uint4*)(planes + chunk * 16) = make_uint4(part[0], part[1], part[2], part[3]);
            if ((chunk & 3) == 0) sum_U[chunk >> 2] = make_int2(sum, 0);
        }
    }
    if (threadIdx.x == 0) scale_M[0] = __ldcg(x_scale_M);
#else
    // A thread takes a part of a chunk at a time, and keeps the first HELD in registers: they are read once.
    constexpr int HELD = 2, STEP = WARPS * 32;
    const int r = threadIdx.x & 3, offset = 16 * (r & 1) + 4 * (r >> 1), parts = units * 16;
    const float* const row = (const float*)x;
    auto column = [&](int part) { return (part >> 2) * 32 + offset; };
    Measured measured;
    float4 held[HELD][2];
#pragma unroll
    for (int j = 0; j < HELD; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) held[j][half] = load_columns(row, column(threadIdx.x + j * STEP) + 8 * half, k);
#pragma unroll
    for (int j = 0; j < HELD; ++j) measured.add(held[j][0]), measured.add(held[j][1]);
    for (int part = threadIdx.x + HELD * STEP; part < parts; part += STEP)
        measured.add(load_columns(row, column(part), k)), measured.add(load_columns(row, column(part) + 8, k));
    const TokenScale t = measured.scale(scratch, 0, WARPS, k, clip, eps);
    if (threadIdx.x == 0) scale_M[0] = t.scale;
    auto code = [&](float v) { return (int)token_code(__fmul_rn(v, measured.norm), t, A_BITS); };
    auto store = [&](int part, float4 first, float4 second) {  // whole warps: parts is a multiple of 32
        const int c0 = code(first.x), c1 = code(first.y), c2 = code(first.z), c3 = code(first.w);
        const int c4 = code(second.x), c5 = code(second.y), c6 = code(second.z), c7 = code(second.w);
        const u32 low = (c0 & 15) | (c1 & 15) << 4 | (c2 & 15) << 8 | (c3 & 15) << 12;
        const u32 word = transpose_bits(low | (u32)((c4 & 15) | (c5 & 15) << 4 | (c6 & 15) << 8 | (c7 & 15) << 12) << 16);
        int sum = ((c0 + c1) + (c2 + c3)) + ((c4 + c5) + (c6 + c7));
#pragma unroll
        for (int lanes = 1; lanes < 16; lanes *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, lanes);
        ((u32*)planes)[part] = word;
        if ((part & 15) == 0) sum_U[part >> 4] = make_int2(sum, 0);
    };
#pragma unroll
    for (int j = 0; j < HELD; ++j)
        if (threadIdx.x + j * STEP < parts) store(threadIdx.x + j * STEP, held[j][0], held[j][1]);
    for (int part = threadIdx.x + HELD * STEP; part < parts; part += STEP)
        store(part, load_columns(row, column(part), k), load_columns(row, column(part) + 8, k));
#endif
}
