// The activations of a linear layer to int8 codes in shared memory, for by_levels.cuh.
#pragma once

#include "measured.cuh"

// Codes of the tokens to code_MK (rows of `stride` bytes, zeros from k on) and their scales; whole block, which needs a
// barrier after it.
__device__ __forceinline__ void codes_in(const void* x, const float* x_scale_M, int m, int k, int padded, float clip, float eps,
                                         i8* code_MK, int stride, float* scale_M, float* scratch) {
#if PROLOGUE == 0
    constexpr int PER_TOKEN = WARPS * 32 / TOKENS;
    const int token = threadIdx.x / PER_TOKEN;
    for (int i = threadIdx.x % PER_TOKEN * 16; token < m && i < padded; i += PER_TOKEN * 16)
        copy_async(shared_address(code_MK) + token * stride + i, (const u8*)x + (i64)token * padded + i);
    commit_copies();
    if (threadIdx.x < m) scale_M[threadIdx.x] = __ldcg(x_scale_M + threadIdx.x);
    wait_for_copies<0>();
#else
    // A token belongs to WARPS / TOKENS warps; each of their lanes takes four neighbouring columns at a time, and keeps
    // the first HELD such vectors in registers: they are read once.
    constexpr int PER_TOKEN = WARPS / TOKENS, HELD = 4, STEP = 4 * 32 * PER_TOKEN;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, token = warp / PER_TOKEN, part = warp % PER_TOKEN;
    const float* const row = (const float*)x + (i64)token * k;
    const int first = token < m ? (part * 32 + lane) * 4 : padded;
    Measured measured;
    float4 held[HELD];
#pragma unroll
    for (int j = 0; j < HELD; ++j) held[j] = load_columns(row, first + j * STEP, k);
#pragma unroll
    for (int j = 0; j < HELD; ++j) measured.add(held[j]);
    for (int i = first + HELD * STEP; i < k; i += STEP) measured.add(load_columns(row, i, k));
    const TokenScale t = measured.scale(scratch, token, PER_TOKEN, k, clip, eps);
    if (token < m && part == 0 && lane == 0) scale_M[token] = t.scale;
    auto store = [&](int i, float4 v) {
        char4 code;
        code.x = token_code(__fmul_rn(v.x, measured.norm), t, A_BITS), code.y = token_code(__fmul_rn(v.y, measured.norm), t, A_BITS);
        code.z = token_code(__fmul_rn(v.z, measured.norm), t, A_BITS), code.w = token_code(__fmul_rn(v.w, measured.norm), t, A_BITS);
        if (i < padded) *(char4*)(code_MK + token * stride + i) = code;
    };
#pragma unroll
    for (int j = 0; j < HELD; ++j) store(first + j * STEP, held[j]);
    for (int i = first + HELD * STEP; i < padded; i += STEP) store(i, load_columns(row, i, k));
#endif
}
