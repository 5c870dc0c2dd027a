// The activations of a linear layer to int8 codes in shared memory, for by_levels.cuh.
#pragma once

#include "measured.cuh"

#if PROLOGUE > 0 && TOKENS > 1
#error "PROLOGUE: 0 for several tokens, whose floats another kernel quantizes"
#endif

#define CODE_STRIDE (UNITS * 128 + 16)  // bytes of shared memory from one token's codes to the next

// Codes of the tokens to code_MK (zeros from CHANNELS on) and their scales; by all that compute, who need a barrier after it.
__device__ __forceinline__ void codes_in(const void* x, const float* x_scale_M, int m, float clip, float eps, i8* code_MK,
                                         float* scale_M, float* scratch) {
#if PROLOGUE == 0
    constexpr int PER_TOKEN = WARPS * 32 / TOKENS, BYTES = UNITS * 128;
    const int token = threadIdx.x / PER_TOKEN, first = threadIdx.x % PER_TOKEN * 16;
    const u32 to = shared_address(code_MK) + token * CODE_STRIDE + first;
    const u8* const from = (const u8*)x + (i64)token * BYTES + first;
    if (token < m)
#pragma unroll
        for (int i = 0; i < BYTES; i += PER_TOKEN * 16)
            if (BYTES % (PER_TOKEN * 16) == 0 || first + i < BYTES) copy_async(to + i, from + i);
    commit_copies();
    if (threadIdx.x < m) scale_M[threadIdx.x] = __ldcg(x_scale_M + threadIdx.x);
    wait_for_copies<0>();
#else
    // A thread takes four neighbouring columns at a time, and keeps the first HELD such vectors in registers.
    constexpr int STEP = 4 * 32 * WARPS, TURNS = (UNITS * 128 + STEP - 1) / STEP, HELD = TURNS < 6 ? TURNS : 6;
    const float* const row = (const float*)x;
    const int first = threadIdx.x * 4;
    auto column = [&](int turn) { return first + turn * STEP; };
    auto there = [&](int turn) { return UNITS * 128 % STEP == 0 || column(turn) < UNITS * 128; };
    Measured measured;
    float4 held[HELD];
#pragma unroll
    for (int j = 0; j < HELD; ++j) held[j] = load_columns(row, there(j) ? column(j) : CHANNELS);
#pragma unroll
    for (int j = 0; j < HELD; ++j) measured.add(held[j]);
    for (int j = HELD; j < TURNS; ++j) measured.add(load_columns(row, there(j) ? column(j) : CHANNELS));
    measured.finish(scratch, clip, eps);
    if (threadIdx.x == 0) scale_M[0] = measured.token.scale;
#pragma unroll
    for (int j = 0; j < HELD; ++j)
        if (there(j)) *(u32*)(code_MK + column(j)) = measured.four_codes(held[j]);
    for (int j = HELD; j < TURNS; ++j)
        if (there(j)) *(u32*)(code_MK + column(j)) = measured.four_codes(load_columns(row, column(j)));
#endif
}
