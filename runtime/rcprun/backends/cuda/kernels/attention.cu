// One token of each of M sequences, each at its own position: attention while decoding. q, keys, values, scales, out and
// their limits: attention.cuh.
//   position, slot  i32 [M]
//   partial         f32 [M][G * chunks][splits][COLUMNS][P]; any contents
//   partial_scale   f32 [M][G * chunks][splits][COLUMNS][2] (peak, total); any contents
//   arrived         u32 [M][G * chunks]; zeros before, zeros after
// window: visible tokens, the query's own among them. scale: log2(e) / sqrt(D).
//
// Grid (splits, G * chunks, M), 32 * WARPS threads; chunks = ceil(R / COLUMNS) share the heads of a KV head, splits (at
// most 128) the tokens. The grid knows no position: a split takes an equal share of the visible tokens, a tile for every
// warp at least; splits beyond what they need leave at once. The last block of a (token, chunk) adds up all, in order.
//
// Defines: HEAD_DIM, BITS (4 or 8).
#ifndef HEAD_DIM
#error "HEAD_DIM: channels of a head"
#endif
#ifndef BITS
#error "BITS: 4 or 8, of a code"
#endif
#include "attention.cuh"

using Decode = Columns<1>;
constexpr int COLUMNS = Decode::COUNT;
constexpr int WARPS = PADDED <= 256 ? 8 : 4;
constexpr int ROW = PADDED + 4;  // floats: no bank conflicts between columns
constexpr int MAX_SPLITS = 128;

struct alignas(4 * UNIT) Unit {
    float x[UNIT];
};

// One token of each of M sequences, each at its own position. Grid (splits, G * chunks, M) with chunks = ceil(R /
// COLUMNS), WARPS warps to a block. A split takes equal shares of the visible tokens, whole tiles for every warp; splits
// beyond what the position needs leave at once. The last of a (token, KV head, chunk) adds up all, in order.
//   position, slot  i32 [M]
//   partial         f32 [M][G * chunks][splits][COLUMNS][PADDED]; any contents
//   partial_scale   f32 [M][G * chunks][splits][COLUMNS][2] (peak, total); any contents
//   arrived         u32 [M][G * chunks]; zeros before, zeros after
// window: visible tokens, the query's own among them. scale: log2(e) / sqrt(D). splits at most 256.
extern "C" __global__ void __launch_bounds__(32 * WARPS, PADDED <= 128 ? 2 : 1)
    decode_attention(const float* q, const u32* keys, const u32* values, const uint2* scales, const i32* position,
                     const i32* slot, float* out, float* partial, float* partial_scale, u32* arrived, int heads,
                     int kv_heads, int capacity, int window, float scale) {
    __shared__ __align__(16) float part[WARPS][COLUMNS][ROW];
    __shared__ float part_peak[WARPS][COLUMNS], part_total[WARPS][COLUMNS];
    __shared__ bool is_last;
    static_assert(sizeof(part) >= sizeof(float) * COLUMNS * (MAX_SPLITS + 1), "part also holds the factors of splits");
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.z, splits = gridDim.x;
    const int query_position = position[row];
    const int first = max(0, query_position - window + 1);
    const int first_tile = first / Decode::TOKENS, tiles = query_position / Decode::TOKENS + 1 - first_tile;
    const int share = max(WARPS, (tiles + splits - 1) / splits);
    const int used = (tiles + share - 1) / share;
    if (blockIdx.x >= used) return;

    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, j = threadIdx.x & 3;
    const int group = heads / kv_heads, chunks = gridDim.y / kv_heads;
    const int kv_head = blockIdx.y / chunks, first_column = blockIdx.y % chunks * COLUMNS;
    const int columns = min(COLUMNS, group - first_column);
    const i64 first_channel = ((i64)row * heads + kv_head * group + first_column) * HEAD_DIM;

    Decode warp_columns;
    const float* query[1] = {g / 2 < columns ? q + first_channel + g / 2 * HEAD_DIM : nullptr};
    warp_columns.position[0] = j < columns ? query_position : -1;
    warp_columns.start(query, scale);
    const int begin = first_tile + blockIdx.x * share, end = first_tile + min(tiles, (int)(blockIdx.x + 1) * share);
    warp_columns.attend(sequence(keys, values, scales, slot[row], kv_head, kv_heads, capacity), begin + warp, end,
                        WARPS, first, query_position, window);

    warp_columns.for_each_unit([&](int, int channel, const float (&x)[UNIT]) {
        if (j >= columns) return;
        Unit unit;
#pragma unroll
        for (int s = 0; s < UNIT; s++) unit.x[s] = x[s];
        *reinterpret_cast<Unit*>(&part[warp][j][channel]) = unit;
    });
    if (g == 0) {
        part_peak[warp][j] = warp_columns.peak[0];
        part_total[warp][j] = warp_columns.total[0];
    }
    __syncthreads();

    const i64 place = ((i64)row * gridDim.y + blockIdx.y) * splits;
    float4* const block_partial = reinterpret_cast<float4*>(partial + place * COLUMNS * PADDED);
    float* const block_scale = partial_scale + place * COLUMNS * 2;
    constexpr int QUADS = PADDED / 4;
    auto write_out = [&](int column, int channel, const float4& x, float total) {
        float* to = out + first_channel + (i64)column * HEAD_DIM + channel;
        const float y[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (channel + c < HEAD_DIM) to[c] = __fdiv_rn(y[c], total);
    };
    for (int index = threadIdx.x; index < columns * QUADS; index += 32 * WARPS) {
        const int column = index / QUADS, channel = index % QUADS * 4;
        float peak = NEVER;
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, part_peak[w][column]);
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        float total = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            const float f = exp2_approx(part_peak[w][column] - peak);
            const float4 x = *reinterpret_cast<const float4*>(&part[w][column][channel]);
            sum = {fmaf(f, x.x, sum.x), fmaf(f, x.y, sum.y), fmaf(f, x.z, sum.z), fmaf(f, x.w, sum.w)};
            total = fmaf(f, part_total[w][column], total);
        }
        if (used == 1) {
            write_out(column, channel, sum, total);
        } else {
            __stcg(block_partial + blockIdx.x * COLUMNS * QUADS + index, sum);
            if (channel == 0)
                __stcg(reinterpret_cast<float2*>(block_scale) + blockIdx.x * COLUMNS + column, float2{peak, total});
        }
    }
    if (used == 1) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicInc(arrived + (i64)row * gridDim.y + blockIdx.y, used - 1) == used - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();

    float(*const split_factor)[MAX_SPLITS + 1] = reinterpret_cast<float(*)[MAX_SPLITS + 1]>(part);
    for (int column = warp; column < columns; column += WARPS) {
        const int lane = threadIdx.x & 31;
        float peak = NEVER, total = 0.0f;
        for (int s = lane; s < used; s += 32) peak = fmaxf(peak, __ldcg(block_scale + (s * COLUMNS + column) * 2));
        peak = warp_max(peak);
        for (int s = lane; s < used; s += 32) {
            const float2 both = __ldcg(reinterpret_cast<const float2*>(block_scale) + s * COLUMNS + column);
            const float f = exp2_approx(both.x - peak);
            split_factor[column][s] = f;
            total = fmaf(f, both.y, total);
        }
        total = warp_sum(total);
        if (lane == 0) split_factor[column][MAX_SPLITS] = total;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < columns * QUADS; index += 32 * WARPS) {
        const int column = index / QUADS;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
        for (int s = 0; s < used; s++) {
            const float f = split_factor[column][s];
            const float4 x = __ldcg(block_partial + s * COLUMNS * QUADS + index);
            sum = {fmaf(f, x.x, sum.x), fmaf(f, x.y, sum.y), fmaf(f, x.z, sum.z), fmaf(f, x.w, sum.w)};
        }
        write_out(column, index % QUADS * 4, sum, split_factor[column][MAX_SPLITS]);
    }
}
