// What several kernels share: warp and block reductions, quantization (SPEC.md, chapter 10), and by its headers, types
// and what is PTX. Compiled with --fmad=false: a fused multiply-add is written fmaf.
#pragma once
#include "ptx.cuh"

#define FULL_MASK 0xffffffffu

// pdl_wait for a block, whose first warp waits: warps that all do go on up to half a microsecond apart.
__device__ __forceinline__ void pdl_wait_together() {
    if (threadIdx.x < 32) pdl_wait();
    __syncthreads();
}

// Of bits that have the floats' order, in one instruction. A NaN, as arithmetic gives it, without a sign, is the largest.
__device__ __forceinline__ float warp_max(float x) {
    const u32 bits = __float_as_uint(x);
    const u32 most = __reduce_max_sync(FULL_MASK, bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u));
    return __uint_as_float(most ^ (most >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

// SPEC.md, "Activations": codes and scale of one token from its largest magnitude.
struct TokenScale {
    float scale, inverse;
    bool zero;
};
__device__ __forceinline__ TokenScale token_scale(float peak, float clip, int bits) {
    const float largest = (float)((1 << (bits - 1)) - 1);
    TokenScale t;
    t.zero = peak < 7.8886090522101181e-31f;  // 2^-100
    t.scale = t.zero ? 1.0f : __fdiv_rn(__fmul_rn(clip, peak), largest);
    t.inverse = __fdiv_rn(1.0f, t.scale);
    return t;
}
__device__ __forceinline__ i8 token_code(float x, const TokenScale& t, int bits) {
    const float largest = (float)((1 << (bits - 1)) - 1);
    const float code = fminf(fmaxf(rintf(__fmul_rn(x, t.inverse)), -largest - 1.0f), largest);
    return t.zero ? (i8)0 : (i8)code;
}

// token_code as the lowest byte, without conversions, which are slow: limits are integers, so they may come first, and
// beyond 2^23 floats are integers. A token that is zero there is so by itself: its numbers are below 2^-100.
struct Coder {
    float inverse, least, largest;

    __device__ __forceinline__ Coder(const TokenScale& token, int bits)
        : inverse(token.inverse), least(-(float)(1 << (bits - 1))), largest(-least - 1.0f) {}
    __device__ __forceinline__ u32 code(float x) const {
        return __float_as_uint(fminf(fmaxf(__fmul_rn(x, inverse), least), largest) + 12582912.0f);
    }
    __device__ __forceinline__ u32 two(const float* x) const { return __byte_perm(code(x[0]), code(x[1]), 0x0040); }
    __device__ __forceinline__ u32 four(const float* x) const { return __byte_perm(two(x), two(x + 2), 0x5410); }
};
