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
// Defines: HEAD_DIM, BITS (4 or 8), PALEY (m; 0: no Hadamard), HADAMARD (order of a block of the transform; it divides D).
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

#include "rope.cuh"

constexpr int WARPS = 4;
constexpr int ROW_HALF_WORDS = (HEAD_DIM + 8 * HALF_WORD - 1) / (8 * HALF_WORD) * 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    rope(const float* qkv, const float* q_gain, const float* k_gain, const float* cosine, const float* sine,
         const i32* position, const i32* slot, const i8* paley, float* q, u16* keys, u16* values, u32* scales, int heads,
         int kv_heads, int capacity, float eps, float norm, float key_clip, float value_clip) {
    __shared__ __align__(16) float vectors[WARPS][STORED + SCRATCH];
    pdl_launch();
    pdl_wait();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const i64 row = blockIdx.x;
    const int head = blockIdx.y * WARPS + warp, all_heads = heads + 2 * kv_heads;
    if (head >= all_heads) return;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    float* x = vectors[warp];

    Head h;
    h.load(qkv + (row * all_heads + head) * HEAD_DIM);
    const int at = position[row];
    if (!is_value) {
        h.load_angles<false>(cosine, sine, at);
        const float* gain = is_query ? q_gain : k_gain;
        if (gain) h.normalize(gain, eps);
        h.rotate();
    }
    h.store(x, x + STORED, !is_value, paley, norm);
    if (is_query) {
        float* to = q + (row * heads + head) * HEAD_DIM;
        for (int i = lane; i < HEAD_DIM; i += 32) to[i] = x[i];
        return;
    }

    const i64 vector = ((i64)slot[row] * kv_heads + (head - heads) % kv_heads) * capacity + at;
    u16* to = is_value ? values + (vector - at % 2) * ROW_HALF_WORDS + at % 2 : keys + vector * ROW_HALF_WORDS;
    const int stride = is_value ? 2 : 1;
    const u32 scale = quantize_head(x, is_value ? value_clip : key_clip, [&](int i, u16 codes) { to[i * stride] = codes; });
    if (lane == 0) scales[vector * 2 + is_value] = scale;
}
