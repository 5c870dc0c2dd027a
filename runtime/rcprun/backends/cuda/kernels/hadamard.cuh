// The parts of Hadamard transforms on tensor cores (see hadamard.cu): float32 as three bf16 terms, signs as bf16, codes.
//
// The including file defines NT (tiles of 8 columns of a warp: 1, 2 or 4).
#pragma once
#include "peak.cuh"

// Columns are stored permuted within a warp's span of 8·NT, so that a lane's outputs are 2·NT adjacent channels:
// channel q·2NT + 2t + e is column 2q + e of tile t.
__device__ __forceinline__ u32 stored_column(u32 column) {
    const u32 within = column % (8 * NT);
    return column - within + within % (2 * NT) / 2 * 8 + within / (2 * NT) * 2 + within % 2;
}

// The upper 16 bits of both, which are bf16, as a pair; and what they leave.
__device__ __forceinline__ u32 split_pair(float& a, float& b) {
    const u32 a_bits = __float_as_uint(a), b_bits = __float_as_uint(b);
    a -= __uint_as_float(a_bits & 0xffff0000u);
    b -= __uint_as_float(b_bits & 0xffff0000u);
    return __byte_perm(a_bits, b_bits, 0x7632);
}

// Register j (0..3) of the A fragment of a word's k step (0..3): a pair of bf16 ±1. Bits 15 - s and 31 - s, with
// s = 4·step + j, are the signs of its lower and upper half. ones: a pair of 1, in another format if need be.
__device__ __forceinline__ u32 signs(u32 word, int step, int j, u32 ones = 0x3f803f80u) {
    return masked_or(word << (4 * step + j), 0x80008000u, ones);
}

// B fragments of NT tiles: 16 rows, 8·NT columns of row-major bf16. address: of row lane % 16, column 8 · (lane / 16).
__device__ __forceinline__ void load_tiles(u32 (&b)[2 * NT], u32 address) {
    if constexpr (NT == 1) {
        load_b(b[0], b[1], address);
    } else {
#pragma unroll
        for (int i = 0; i < NT / 2; ++i) load_b(b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3], address + 32 * i);
    }
}

// A row of WIDTH channels times Sylvester(WIDTH): four channels in each of WIDTH / 4 neighbouring lanes.
template <int WIDTH>
__device__ __forceinline__ void sylvester_of_row(float (&v)[4]) {
    const float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = a + c;
    v[1] = b + d;
    v[2] = a - c;
    v[3] = b - d;
#pragma unroll
    for (int offset = 1; offset < WIDTH / 4; offset *= 2) {
        const float sign = threadIdx.x & offset ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = fmaf(sign, v[j], __shfl_xor_sync(FULL_MASK, v[j], offset));
    }
}

// Four channels from `column` on of a row, as three terms, TERM numbers apart.
template <int TERM>
__device__ __forceinline__ void store_terms(u16* row, u32 column, float (&v)[4]) {
    u16* const low = row + stored_column(column);
    u16* const high = row + stored_column(column + 2);
#pragma unroll
    for (int term = 0; term < 3; ++term) {
        *(u32*)(low + term * TERM) = split_pair(v[0], v[1]);
        *(u32*)(high + term * TERM) = split_pair(v[2], v[3]);
    }
}
