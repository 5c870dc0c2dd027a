// Float activations of one token on their way into a linear layer: measured, and what their codes need to know.
#pragma once

#include "peak.cuh"

#ifndef CHANNELS
#error "CHANNELS: columns of the layer"
#endif

#define UNITS ((CHANNELS + 255) / 256 * 2)  // of 128 columns, whole stages

// The threads of a block but those that fetch weights.
__device__ __forceinline__ void sync_computing() {
#if RCP_HOPPER
    sync_some<WARPS * 32>();
#else
    __syncthreads();
#endif
}

// Four neighbouring columns of the token, zeros from CHANNELS on.
__device__ __forceinline__ float4 load_columns(const float* row, int i) {
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if constexpr (CHANNELS % 4 == 0) {
        if (i < CHANNELS) v = __ldcg((const float4*)(row + i));
    } else {
        if (i < CHANNELS) v.x = __ldcg(row + i);
        if (i + 1 < CHANNELS) v.y = __ldcg(row + i + 1);
        if (i + 2 < CHANNELS) v.z = __ldcg(row + i + 2);
        if (i + 3 < CHANNELS) v.w = __ldcg(row + i + 3);
    }
    return v;
}

// sum / CHANNELS; exact as a product where it is a power of two.
__device__ __forceinline__ float mean(float sum) {
    if constexpr ((CHANNELS & (CHANNELS - 1)) == 0) return __fmul_rn(sum, 1.0f / CHANNELS);
    return __fdiv_rn(sum, (float)CHANNELS);
}

// Sum of squares and largest magnitude of the columns that a thread has added; then of the token.
struct Measured {
    float sum = 0.0f, norm = 1.0f;
    u32 peak = 0;
    TokenScale token;

    __device__ __forceinline__ void add(float4 v) {
        sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        peak = max(max(peak, max(magnitude(v.x), magnitude(v.y))), max(magnitude(v.z), magnitude(v.w)));
    }
    // Sets norm and token, from what the threads of all WARPS warps have added. scratch: 2 * WARPS floats, aligned to 16 bytes.
    __device__ __forceinline__ void finish(float* scratch, float clip, float eps) {
        const int warp = threadIdx.x >> 5;
        if (PROLOGUE == 1) sum = warp_sum(sum);
        peak = __reduce_max_sync(FULL_MASK, peak);
        if ((threadIdx.x & 31) == 0) scratch[warp] = sum, scratch[WARPS + warp] = __uint_as_float(peak);
        sync_computing();
        const float4* const of_warps = (const float4*)scratch;
        float sums[WARPS / 4];
#pragma unroll
        for (int i = 0; i < WARPS / 4; ++i) {
            const float4 s = of_warps[i], p = of_warps[WARPS / 4 + i];
            sums[i] = (s.x + s.y) + (s.z + s.w);
            peak = max(max(peak, max(magnitude(p.x), magnitude(p.y))), max(magnitude(p.z), magnitude(p.w)));
        }
        sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        if (PROLOGUE == 1) norm = __frcp_rn(__fsqrt_rn(__fadd_rn(mean(sum), eps)));
        token = token_scale(__fmul_rn(__uint_as_float(peak), norm), clip, A_BITS);  // rounding keeps the order: the peak stays it
    }
    // The codes of four neighbours, as bytes.
    __device__ __forceinline__ u32 four_codes(float4 v) const {
        const Coder coder(token, A_BITS);
        if (PROLOGUE != 1) return coder.four(&v.x);
        const float y[4] = {__fmul_rn(v.x, norm), __fmul_rn(v.y, norm), __fmul_rn(v.z, norm), __fmul_rn(v.w, norm)};
        return coder.four(y);
    }
};
