// M tokens of one sequence at positions start, start + 1, ..., causal. q, keys, values, scales, out and their limits:
// attention.cuh. window: visible tokens, the query's own among them. scale: log2(e) / sqrt(D).
//
// Grid (G, ceil(M * R / (WARPS * 4 * TILES))), 32 * WARPS threads. A warp takes 4 * TILES of the M * R (token, head of the
// KV head) in that order, the last tokens first, and shares nothing but the cache lines with the others of its block.
//
// Defines: HEAD_DIM, BITS (4 or 8), TILES.
#ifndef HEAD_DIM
#error "HEAD_DIM: channels of a head"
#endif
#ifndef BITS
#error "BITS: 4 or 8, of a code"
#endif
#ifndef TILES
#error "TILES: groups of 4 columns to a warp"
#endif
#include "attention.cuh"

using Prefill = Columns<TILES>;
constexpr int WARPS = 4;
constexpr int BLOCKS = TILES * PADDED <= 128 ? 4 : TILES <= 2 && WORDS <= 4 ? 3 : 2;  // of a multiprocessor

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    prefill_attention(const float* q, const u32* keys, const u32* values, const uint2* scales, float* out, int rows,
                      int start, int slot, int heads, int kv_heads, int capacity, int window, float scale) {
    pdl_launch();
    pdl_wait();
    const int g = (threadIdx.x & 31) >> 2, j = threadIdx.x & 3;
    const int group = heads / kv_heads, kv_head = blockIdx.x;
    const int strip = (gridDim.y - 1 - blockIdx.y) * WARPS + (threadIdx.x >> 5);
    const int first_column = strip * Prefill::COUNT, columns = min(Prefill::COUNT, rows * group - first_column);
    if (columns <= 0) return;
    auto channels = [&](int column) {  // where the column's D channels begin, in q and in out
        const int index = first_column + column;
        return ((i64)(index / group) * heads + kv_head * group + index % group) * HEAD_DIM;
    };

    Prefill warp_columns;
    const float* query[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const int column = 4 * n + g / 2;
        query[n] = column < columns ? q + channels(column) : nullptr;
        warp_columns.position[n] = 4 * n + j < columns ? start + (first_column + 4 * n + j) / group : -1;
    }
    warp_columns.start(query, scale);
    const int first = max(0, start + first_column / group - window + 1);
    const int last = start + (first_column + columns - 1) / group;
    warp_columns.attend(sequence(keys, values, scales, slot, kv_head, kv_heads, capacity), first / Prefill::TOKENS,
                        last / Prefill::TOKENS + 1, 1, first, last, window);

    warp_columns.for_each_unit([&](int n, int channel, const float (&x)[UNIT]) {
        if (4 * n + j >= columns) return;
        float* to = out + channels(4 * n + j) + channel;
#pragma unroll
        for (int s = 0; s < UNIT; s++)
            if (channel + s < HEAD_DIM) to[s] = __fdiv_rn(x[s], warp_columns.total[n]);
    });
}
