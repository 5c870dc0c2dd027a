// A 2-bit linear layer for 1 to 8 tokens (SPEC.md, "Linear"), with what comes before and after it.
//
//   unit_TU     u8  [tiles][UNITS][UNIT_BYTES]   weights as repack.cu leaves them (units.cuh)
//   scale_R     f32 [tiles * 16]                 row scales, in the order of the tiles' rows; 0 in rows that are padding
//   bias_R      f32 [tiles * 16] or null
//   x           f32 [m][k], or i8 codes [m][units * 128] with zeros from k on (PROLOGUE 0)
//   x_scale_M   f32 [m]                          of the codes; PROLOGUE 0 only
//   out         f32 [m][columns]                 columns: rows of the layer, or half of them (EPILOGUE 2)
//   PROLOGUE 0: x is codes.  1: x is normalized (RMSNorm, eps) and quantized (clip, A_BITS).  2: x is quantized.
//   EPILOGUE 0: out = y.  1: out += y.  2: of each tile, rows 0-7 are gate and rows 8-15 up: out = silu(gate) * up.
//   Limits: 1 <= m <= TOKENS (1 or 8); PROLOGUE 0 for 8 tokens; CHANNELS a multiple of 4, else loads are slower; int32 sums,
//   so CHANNELS < 2^31 / 127^2.
//
// Every block owns whole tiles, all columns of them, so that sums never leave it. The tiles' units are one contiguous
// stream, cut evenly among the warps (units.cuh), which begins to flow through shared memory (stream.cuh) before the block
// waits for earlier kernels. Warps add their sums (integers: any order) in shared memory. PLANES 0: products by
// by_levels.cuh. 1: by by_planes.cuh, one token of 4 bits only.

#ifndef TOKENS
#error "TOKENS: 1 or 8"
#endif
#ifndef CHANNELS
#error "CHANNELS: columns of the layer"
#endif
#ifndef A_BITS
#error "A_BITS: 4 or 8"
#endif
#ifndef PROLOGUE
#error "PROLOGUE: 0, 1 or 2"
#endif
#ifndef EPILOGUE
#error "EPILOGUE: 0, 1 or 2"
#endif
#ifndef PLANES
#error "PLANES: 0 or 1"
#endif

#include "stream.cuh"

#define WARPS STREAMS  // that compute

#if PLANES
#include "by_planes.cuh"
#else
#include "by_levels.cuh"
#endif

#define THREADS (WARPS * 32)
#define RING_BYTES (SLOTS * PIECE_BYTES)

constexpr int STAGES = UNITS / STAGE_UNITS;  // of a tile

extern "C" __global__ void __launch_bounds__(THREADS + FETCHING_WARPS * 32, TOKENS == 1 ? 2 : 1)
    linear(const u8* unit_TU, const float* scale_R, const float* bias_R, const void* x, const float* x_scale_M, float* out,
           int m, int columns, int tiles, float clip, float eps) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 barriers[2][SLOTS], activations_there;
    __shared__ __align__(16) float scratch[2 * WARPS];
    __shared__ float token_scales[TOKENS];
    pdl_launch();
    const int warp = threadIdx.x >> 5;
    const Share share(blockIdx.x, gridDim.x, tiles);
    const int first = share.first, owned = share.owned;
    const Part part(warp, owned * STAGES);
    const u8* const from = unit_TU + (i64)first * STAGES * STAGE_BYTES;
    Stream stream;
    stream.buffer = kept(shared_address(memory));
#if RCP_HOPPER
    stream.full = kept(shared_address(barriers[0])), stream.empty = kept(shared_address(barriers[1]));
    if (threadIdx.x == THREADS) {
        for (int i = 0; i < SLOTS; ++i) barrier_init(stream.full + i * 8, 1), barrier_init(stream.empty + i * 8, WARPS);
        barrier_init(shared_address(&activations_there));
        barrier_init_done();
    }
    __syncthreads();
    if (warp == WARPS) {
        if (threadIdx.x == THREADS)
            stream.fetch(from, part.least + (part.more > 0), part.more > 0 ? part.more : WARPS, TOKENS == 1 ? 1 : FLIGHT,
                         shared_address(&activations_there));
        return;
    }
    stream.begin();
#else
    stream.begin(from + warp * STAGE_BYTES, part.count);
#endif
    int* const sums = (int*)(memory + RING_BYTES);  // [owned * 16][TOKENS]
    float* const scales = (float*)(sums + owned * 16 * TOKENS);  // [owned * 16], then biases
    u8* const activations = (u8*)(scales + owned * 32);
    for (int i = threadIdx.x; i < owned * 16 * TOKENS; i += THREADS) sums[i] = 0;
    for (int i = threadIdx.x; i < owned * 16; i += THREADS) {
        scales[i] = __ldg(scale_R + first * 16 + i);
        if (bias_R) scales[owned * 16 + i] = __ldg(bias_R + first * 16 + i);
    }
    constexpr int ROWS = EPILOGUE == 2 ? 8 : 16;  // of a tile, in out
    const int outputs = owned * ROWS * m;
    struct Output {
        int token, row;
        float* to;
        bool exists;
    };
    auto output = [&](int i) {
        const int token = TOKENS == 1 ? 0 : i / (owned * ROWS), local = i - token * owned * ROWS, column = first * ROWS + local;
        return Output{token, local / ROWS * 16 + local % ROWS, out + (i64)token * columns + column, column < columns};
    };
    Product product;
    int tile = (u32)part.first / STAGES, in_tile = STAGES - (part.first - tile * STAGES);
#if PLANES
    product.prepare(activations);
#else
    product.prepare((const i8*)activations, m);
#endif
    product.seek(STAGES - in_tile);
    if (warp == 0) pdl_wait();  // as in pdl_wait_together
    sync_computing();
#if PLANES
    planes_in(x, x_scale_M, clip, eps, activations, token_scales, scratch);
#else
    codes_in(x, x_scale_M, m, clip, eps, (i8*)activations, token_scales, scratch);
#endif
#if RCP_HOPPER
    if (threadIdx.x == 0) barrier_arrive(shared_address(&activations_there));
#endif
    float before = 0.0f;  // what is in this thread's first output
    if (EPILOGUE == 1 && threadIdx.x < outputs) {
        const Output o = output(threadIdx.x);
        if (o.exists) before = __ldcg(o.to);
    }
    sync_computing();
#pragma unroll 1
    for (int left = part.count; left > 0; --left) {
        product.add(stream.wait());
        stream.release();
        if (--in_tile == 0) {
            product.flush(sums + tile * 16 * TOKENS);
            product.seek(0);
            in_tile = STAGES, ++tile;
        }
    }
    if (in_tile != STAGES) product.flush(sums + tile * 16 * TOKENS);
    sync_computing();

    for (int i = threadIdx.x; i < outputs; i += THREADS) {
        const Output o = output(i);
        if (!o.exists) continue;
        auto value = [&](int r) {
            const float y = __fmul_rn(__fmul_rn((float)sums[r * TOKENS + o.token], token_scales[o.token]), scales[r]);
            return bias_R ? __fadd_rn(y, scales[owned * 16 + r]) : y;
        };
#if EPILOGUE == 2
        const float gate = value(o.row), up = value(o.row + 8);
        *o.to = __fmul_rn(__fdiv_rn(gate, 1.0f + expf(-gate)), up);
#elif EPILOGUE == 1
        *o.to = __fadd_rn(i < THREADS ? before : __ldcg(o.to), value(o.row));
#else
        *o.to = value(o.row);
#endif
    }
}
