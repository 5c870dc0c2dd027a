// Float activations on their way into a linear layer: read once, measured, and what their codes need to know.
#pragma once

#include "common.cuh"

// Four neighbouring columns of a row of k, zeros from k on.
__device__ __forceinline__ float4 load_columns(const float* row, int i, int k) {
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if ((k & 3) == 0) {
        if (i < k) v = __ldcg((const float4*)(row + i));
    } else {
        if (i < k) v.x = __ldcg(row + i);
        if (i + 1 < k) v.y = __ldcg(row + i + 1);
        if (i + 2 < k) v.z = __ldcg(row + i + 2);
        if (i + 3 < k) v.w = __ldcg(row + i + 3);
    }
    return v;
}

// The threads of a block but those that fetch weights.
__device__ __forceinline__ void sync_computing() {
#if RCP_HOPPER
    sync_some<WARPS * 32>();
#else
    __syncthreads();
#endif
}

// Sum of squares and largest magnitude of the columns that a thread has added; then of a token.
struct Measured {
    float sum = 0.0f, peak = 0.0f, norm;

    __device__ __forceinline__ void add(float4 v) {
        sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        peak = max_or_nan(peak, max_or_nan(max_or_nan(fabsf(v.x), fabsf(v.y)), max_or_nan(fabsf(v.z), fabsf(v.w))));
    }
    // Of token `token`, which PER_TOKEN warps from token * PER_TOKEN on have added; sets norm too. Whole block. scratch: 2 * WARPS.
    __device__ __forceinline__ TokenScale scale(float* scratch, int token, int per_token, int k, float clip, float eps) {
        const int warp = threadIdx.x >> 5;
        sum = warp_sum(sum), peak = warp_max(peak);
        if ((threadIdx.x & 31) == 0) scratch[warp] = sum, scratch[WARPS + warp] = peak;
        sync_computing();
        sum = 0.0f, peak = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            if (i >= per_token) break;
            sum += scratch[token * per_token + i];
            peak = max_or_nan(peak, scratch[WARPS + token * per_token + i]);
        }
        norm = PROLOGUE == 1 ? __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)k) + eps)) : 1.0f;
        return token_scale(__fmul_rn(peak, norm), clip, A_BITS);  // rounding keeps the order: the peak stays it
    }
};
