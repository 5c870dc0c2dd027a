// Queries, keys and values of new tokens: RoPE, Hadamard, and the way into the cache (SPEC.md, "Attention", steps 2 to
// 5, and "KV cache"). One warp to a (token, head); grid (M, ceil((H + 2G) / 4)), 4 warps to a block.
//
// Shapes: M tokens, H query heads, G KV heads, D = HEAD_DIM, T = capacity, N slots; P and S as in attention.cu.
//   qkv             f32 [M][(H + 2G) * D]: heads of q, of k, of v
//   q_gain, k_gain  f32 [D], or null without qk_norm
//   cosine, sine    f32 [T][D / 2]
//   position, slot  i32 [M]
//   paley           i8 [PALEY][PALEY], P_m of SPEC.md, "Transforms", or null where PALEY is 0 or 1
//   q               f32 [M][H * D], written
//   keys, values    u16 [N][G][T / 2][2][P / S], [N][G][T / 2][P / S][2], written at (slot, position); S codes each,
//                   lowest bits first
//   scales          u32 [N][G][T][2], written: low (f16, lower half) and step (f16, upper half) of key, value
// eps: of the head's norm. norm: f32(1 / sqrt(HADAMARD)). Limits: D even, at most 1,024.
//
// Defines: HEAD_DIM, BITS (4 or 8), PALEY (m; 0: no Hadamard),
// HADAMARD (order of a block of the transform; it divides D).
#include "common.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM: channels of a head"
#endif
#ifndef BITS
#error "BITS: 4 or 8, of a code"
#endif
#ifndef PALEY
#error "PALEY: order of the Paley factor of the Hadamard transform, or 0"
#endif
#ifndef HADAMARD
#error "HADAMARD: order of a block of the Hadamard transform"
#endif

constexpr int WARPS = 4;
constexpr int HALF_DIM = HEAD_DIM / 2;
constexpr int PAIRS = (HALF_DIM + 31) / 32;  // of channels i, i + D / 2 that a lane holds
constexpr int UNIT = 16 / BITS;
constexpr int UNITS = (HEAD_DIM + UNIT - 1) / UNIT;
constexpr int ROW_UNITS = (HEAD_DIM + 8 * UNIT - 1) / (8 * UNIT) * 8;
constexpr int STORED = UNITS * UNIT;

// x: D floats of this warp, in shared memory; scratch: as many. Returns which of the two has the result.
__device__ __forceinline__ float* hadamard(float* x, float* scratch, const i8* paley) {
#if PALEY > 0
    constexpr int SYLVESTER = HADAMARD / PALEY;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int stride = 1; stride < SYLVESTER; stride *= 2) {
#pragma unroll
        for (int pair = lane; pair < HALF_DIM; pair += 32) {
            const int a = pair / stride * 2 * stride + pair % stride, b = a + stride;
            const float first = x[a], second = x[b];
            x[a] = first + second;
            x[b] = first - second;
        }
        __syncwarp();
    }
#if PALEY > 1
    for (int channel = lane; channel < HEAD_DIM; channel += 32) {
        const int block = channel / HADAMARD * HADAMARD, row = channel % HADAMARD / SYLVESTER;
        const float* column = x + block + channel % SYLVESTER;
        float sum = 0.0f;
        for (int k = 0; k < PALEY; k++) sum += (float)paley[row * PALEY + k] * column[k * SYLVESTER];
        scratch[channel] = sum;
    }
    __syncwarp();
    return scratch;
#endif
#endif
    return x;
}

// x within what a half can hold; NaN stays.
__device__ __forceinline__ float clamp_half(float x) {
    return -max_or_nan(-max_or_nan(x, -65504.0f), -65504.0f);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    rope(const float* qkv, const float* q_gain, const float* k_gain, const float* cosine, const float* sine,
         const i32* position, const i32* slot, const i8* paley, float* q, u16* keys, u16* values, u32* scales, int heads,
         int kv_heads, int capacity, float eps, float norm, float key_clip, float value_clip) {
    __shared__ __align__(16) float vectors[PALEY > 1 ? 2 : 1][WARPS][STORED];
    pdl_launch();
    pdl_wait();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const i64 row = blockIdx.x;
    const int head = blockIdx.y * WARPS + warp, all_heads = heads + 2 * kv_heads;
    if (head >= all_heads) return;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const float* from = qkv + (row * all_heads + head) * HEAD_DIM;
    float* x = vectors[0][warp];

    float first[PAIRS], second[PAIRS];
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        const int i = lane + 32 * k;
        first[k] = i < HALF_DIM ? from[i] : 0.0f;
        second[k] = i < HALF_DIM ? from[i + HALF_DIM] : 0.0f;
    }
    const int at = position[row];
    if (!is_value) {
        const float* gain = is_query ? q_gain : k_gain;
        if (gain) {
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < PAIRS; k++) sum += first[k] * first[k] + second[k] * second[k];
            const float mean = __fdiv_rn(warp_sum(sum), (float)HEAD_DIM);
            const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + eps));
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                const int i = min(lane + 32 * k, HALF_DIM - 1);
                first[k] = first[k] * inverse * gain[i];
                second[k] = second[k] * inverse * gain[i + HALF_DIM];
            }
        }
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const i64 i = (i64)at * HALF_DIM + min(lane + 32 * k, HALF_DIM - 1);
            const float c = cosine[i], s = sine[i], a = first[k], b = second[k];
            first[k] = a * c - b * s;
            second[k] = b * c + a * s;
        }
    }
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        const int i = lane + 32 * k;
        if (i < HALF_DIM) {
            x[i] = first[k];
            x[i + HALF_DIM] = second[k];
        }
    }
    __syncwarp();
    float factor = 1.0f;  // times 1 changes nothing
    if (PALEY > 0 && !is_value) {
        x = hadamard(x, vectors[PALEY > 1 ? 1 : 0][warp], paley);
        factor = norm;
    }
    if (is_query) {
        float* to = q + (row * heads + head) * HEAD_DIM;
        for (int i = lane; i < HEAD_DIM; i += 32) to[i] = x[i] * factor;
        return;
    }

    float high = -__int_as_float(0x7f800000), minus_low = high;
    for (int i = lane; i < HEAD_DIM; i += 32) {
        const float y = x[i] * factor;
        x[i] = y;
        high = max_or_nan(high, y);
        minus_low = max_or_nan(minus_low, -y);
    }
    __syncwarp();
    constexpr float TOP = (1 << BITS) - 1;
    const float clip = is_value ? value_clip : key_clip;
    high = clamp_half(clip * warp_max(high));
    const u16 low_half = half_from_float(clamp_half(clip * -warp_max(minus_low)));
    const float low = float_from_half(low_half);
    const float rounded = float_from_half(half_from_float(clamp_half(__fdiv_rn(high - low, TOP))));
    const float step = max_or_nan(rounded, 6.103515625e-05f);  // 2^-14
    const float inverse = __fdiv_rn(1.0f, step);

    const i64 vector = ((i64)slot[row] * kv_heads + (head - heads) % kv_heads) * capacity + at;
    if (lane == 0) scales[vector * 2 + is_value] = low_half | (u32)half_from_float(step) << 16;
    u16* to = is_value ? values + (vector - at % 2) * ROW_UNITS + at % 2 : keys + vector * ROW_UNITS;
    const int stride = is_value ? 2 : 1;
    for (int unit = lane; unit < UNITS; unit += 32) {
        u32 codes = 0;
#pragma unroll
        for (int s = 0; s < UNIT; s++) {
            const int i = unit * UNIT + s;
            const float code = i < HEAD_DIM ? rintf((x[i] - low) * inverse) : 0.0f;
            codes |= (u32)fminf(fmaxf(code, 0.0f), TOP) << (BITS * s);
        }
        to[unit * stride] = (u16)codes;
    }
}
