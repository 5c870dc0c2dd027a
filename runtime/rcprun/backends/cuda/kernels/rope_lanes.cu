// rope_many.cu for heads whose channels are a power of two, 32 to 512: the same results, but that with gains the sum of
// squares is added in another order. D / 16 lanes do a head, and a warp 512 / D neighbouring heads of one kind (q, k or
// v), of one token after the other; where a kind has no more heads, its last is done again.
//
// Grid (any, ceil(groups / 4)), groups: the sum of ceil(heads * D / 512) over q, k and v; 4 warps to a block. Blocks
// share tokens evenly along x. Arguments and defines: rope_many.cu; tokens: M.
#ifndef HEAD_DIM
#error "HEAD_DIM: channels of a head"
#endif
#ifndef BITS
#error "BITS: 4 or 8, of a code"
#endif
#ifndef PALEY
#error "PALEY: 1 for the Hadamard transform, 0 for none"
#endif
#ifndef HADAMARD
#error "HADAMARD: HEAD_DIM"
#endif

#include "rescale.cuh"
#include "rope.cuh"

constexpr int WARPS = 4;
constexpr int LANES = HEAD_DIM / 16, HEADS = 32 / LANES;
static_assert((HEAD_DIM & (HEAD_DIM - 1)) == 0 && HEAD_DIM >= 32 && HEAD_DIM <= 512, "limits");
static_assert(PALEY <= 1 && (PALEY == 0 || HADAMARD == HEAD_DIM), "limits");

// Channels 4 (LANES c + lane) + j of a head: x[4 c + j]. Those RoPE turns together, D / 2 apart, are in one lane.
using Channels = float[16];

__device__ __forceinline__ void put(float* to, const float4& four) { to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w; }

template <int COUNT>
__device__ __forceinline__ void load(float (&x)[COUNT], const float* from) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) put(x + i, *(const float4*)(from + i * LANES));
}

__device__ __forceinline__ float sum_of_head(float x) {
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) x += __shfl_xor_sync(FULL_MASK, x, lanes);
    return x;
}
__device__ __forceinline__ float max_of_head(float x) {
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) x = max_or_nan(x, __shfl_xor_sync(FULL_MASK, x, lanes));
    return x;
}

__device__ __forceinline__ void normalize(Channels& x, const float* gain, float eps) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += x[i] * x[i];
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum_of_head(sum), (float)HEAD_DIM) + eps));
    Channels g;
    load(g, gain);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = x[i] * inverse * g[i];
}

__device__ __forceinline__ void rotate(Channels& x, const float (&c)[8], const float (&s)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float a = x[i], b = x[i + 8];
        x[i] = a * c[i] - b * s[i];
        x[i + 8] = b * c[i] + a * s[i];
    }
}

template <int STRIDE>
__device__ __forceinline__ void butterflies(Channels& x) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i & STRIDE) continue;
        const float a = x[i], b = x[i + STRIDE];
        x[i] = a + b;
        x[i + STRIDE] = a - b;
    }
}

// The sums and differences of Head in rope.cuh, in the same order of strides.
__device__ __forceinline__ void hadamard(Channels& x, float norm) {
    butterflies<1>(x);
    butterflies<2>(x);
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) {
        const float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = fmaf(sign, x[i], __shfl_xor_sync(FULL_MASK, x[i], lanes));
    }
    butterflies<4>(x);
    butterflies<8>(x);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= norm;
}

// As quantize_head: write(half word, its codes).
template <typename Write>
__device__ __forceinline__ u32 quantize(const Channels& x, float clip, Write write) {
    float high = x[0], minus_low = -x[0];
#pragma unroll
    for (int i = 1; i < 16; ++i) {
        high = max_or_nan(high, x[i]);
        minus_low = max_or_nan(minus_low, -x[i]);
    }
    const HeadScale scale(max_of_head(high), -max_of_head(minus_low), clip);
#pragma unroll
    for (int i = 0; i < 16; i += HALF_WORD) {
        u32 codes = 0;
#pragma unroll
        for (int j = HALF_WORD - 1; j >= 0; --j) {
            // In the lowest bits; what is above those of a half word is shifted out or stays above.
            const float code = fminf(fmaxf((x[i + j] - scale.low) * scale.inverse, 0.0f), HeadScale::TOP);
            codes = (codes << BITS) + __float_as_uint(code + 12582912.0f);
        }
        write((i / 4 * LANES + threadIdx.x % LANES) * (4 / HALF_WORD) + i % 4 / HALF_WORD, (u16)codes);
    }
    return scale.bits;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 6)
    rope_lanes(const int* sum_MR, const float* x_scale_M, const float* scale_R, const float* bias_R, const float* q_gain,
               const float* k_gain, const float* cosine, const float* sine, const i32* position, const i32* slot,
               const i8*, float* q, u16* keys, u16* values, u32* scales, int tokens, int rows, int heads, int kv_heads,
               int capacity, float eps, float norm, float key_clip, float value_clip) {
    pdl_launch();
    const int q_groups = (heads + HEADS - 1) / HEADS, kv_groups = (kv_heads + HEADS - 1) / HEADS;
    const int group = blockIdx.y * WARPS + threadIdx.x / 32;
    if (group >= q_groups + 2 * kv_groups) return;
    const bool is_query = group < q_groups, is_value = group >= q_groups + kv_groups;
    const int in_kind = group - (is_query ? 0 : is_value ? q_groups + kv_groups : q_groups);
    const int head = min(in_kind * HEADS + (int)threadIdx.x % 32 / LANES, (is_query ? heads : kv_heads) - 1);
    const int first = (threadIdx.x % LANES) * 4;
    const int row = ((is_query ? 0 : is_value ? heads + kv_heads : heads) + head) * HEAD_DIM + first;

    Channels scale;
    load(scale, scale_R + row);
    pdl_wait();
    const int share = (tokens + gridDim.x - 1) / gridDim.x, end = min(tokens, share * ((int)blockIdx.x + 1));
#pragma unroll 1
    for (int token = share * blockIdx.x; token < end; ++token) {
        const int at = position[token];
        const float x_scale = x_scale_M[token];
        int4 sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = __ldcs((const int4*)(sum_MR + (i64)token * rows + row + 4 * LANES * i));
        Channels x;
#pragma unroll
        for (int i = 0; i < 4; ++i) put(x + 4 * i, rescaled(sums[i], x_scale, scale + 4 * i));
        if (bias_R) {
            Channels bias;
            load(bias, bias_R + row);
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = __fadd_rn(x[i], bias[i]);
        }
        if (!is_value) {
            float c[8], s[8];
            load(c, cosine + (i64)at * HALF_DIM + first);
            load(s, sine + (i64)at * HALF_DIM + first);
            const float* const gain = is_query ? q_gain : k_gain;
            if (gain) normalize(x, gain + first, eps);
            rotate(x, c, s);
            if constexpr (PALEY == 1) hadamard(x, norm);
        }
        if (is_query) {
            float4* const to = (float4*)(q + ((i64)token * heads + head) * HEAD_DIM + first);
#pragma unroll
            for (int i = 0; i < 4; ++i) to[LANES * i] = {x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
            continue;
        }
        const i64 vector = ((i64)slot[token] * kv_heads + head) * capacity + at;
        u16* const to = is_value ? values + (vector - at % 2) * HALF_WORDS + at % 2 : keys + vector * HALF_WORDS;
        const int stride = is_value ? 2 : 1;
        const u32 bits =
            quantize(x, is_value ? value_clip : key_clip, [&](int i, u16 codes) { to[i * stride] = codes; });
        if (first == 0) scales[vector * 2 + is_value] = bits;
    }
}
