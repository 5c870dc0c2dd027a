// From the integer sums of the fused q|k|v linear to queries, and to keys and values in the cache, for many tokens: as
// rescale.cu and then rope.cu do it. One warp to a (token, head); grid (M, ceil((H + 2G) / 4)), 4 warps to a block.
//
//   sum_MR          i32 [M][rows]      rows (H + 2G) * D and more: heads of q, of k, of v
//   x_scale_M       f32 [M];  scale_R  f32 [rows];  bias_R  f32 [rows] or null
// Everything else: rope.cu, its defines too.
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

#include "rescale.cuh"
#include "rope.cuh"

constexpr int WARPS = 4;
constexpr int ROW_HALF_WORDS = (HEAD_DIM + 8 * HALF_WORD - 1) / (8 * HALF_WORD) * 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    rope_many(const int* sum_MR, const float* x_scale_M, const float* scale_R, const float* bias_R, const float* q_gain,
              const float* k_gain, const float* cosine, const float* sine, const i32* position, const i32* slot,
              const i8* paley, float* q, u16* keys, u16* values, u32* scales, int rows, int heads, int kv_heads, int capacity,
              float eps, float norm, float key_clip, float value_clip) {
    __shared__ __align__(16) float vectors[WARPS][STORED + SCRATCH];
    pdl_launch();
    pdl_wait();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const i64 token = blockIdx.x;
    const int head = blockIdx.y * WARPS + warp;
    if (head >= heads + 2 * kv_heads) return;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    float* x = vectors[warp];

    const int at = position[token];
    const float x_scale = x_scale_M[token];
    auto channel = [&](int i) {
        const int row = head * HEAD_DIM + i;
        const float y = rescaled(__ldcs(sum_MR + token * rows + row), x_scale, scale_R[row]);
        return bias_R ? __fadd_rn(y, bias_R[row]) : y;
    };
    Head h;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        const int i = lane + 32 * k;
        h.first[k] = i < HALF_DIM ? channel(i) : 0.0f;
        h.second[k] = i < HALF_DIM ? channel(i + HALF_DIM) : 0.0f;
    }
    if (!is_value) {
        h.load_angles<false>(cosine, sine, at);
        const float* gain = is_query ? q_gain : k_gain;
        if (gain) h.normalize(gain, eps);
        h.rotate();
    }
    h.store(x, x + STORED, !is_value, paley, norm);
    if (is_query) {
        float* to = q + (token * heads + head) * HEAD_DIM;
        for (int i = lane; i < HEAD_DIM; i += 32) to[i] = x[i];
        return;
    }

    const i64 vector = ((i64)slot[token] * kv_heads + (head - heads) % kv_heads) * capacity + at;
    u16* to = is_value ? values + (vector - at % 2) * ROW_HALF_WORDS + at % 2 : keys + vector * ROW_HALF_WORDS;
    const int stride = is_value ? 2 : 1;
    const u32 scale = quantize_head(x, is_value ? value_clip : key_clip, [&](int i, u16 codes) { to[i * stride] = codes; });
    if (lane == 0) scales[vector * 2 + is_value] = scale;
}
