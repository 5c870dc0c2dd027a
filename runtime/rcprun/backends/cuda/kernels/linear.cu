// A 2-bit linear layer for 1 to 8 tokens (SPEC.md, "Linear"), with what comes before and after it.
//
//   unit_TU     u8  [tiles][units][UNIT_BYTES]   weights as repack.cu leaves them: 16 rows x 128 columns a unit
//   scale_R     f32 [tiles * 16]                 row scales, in the order of the tiles' rows; 0 in rows that are padding
//   bias_R      f32 [tiles * 16] or null
//   x           f32 [m][k], or i8 codes [m][units * 128] with zeros from k on (PROLOGUE 0)
//   x_scale_M   f32 [m]                          of the codes; PROLOGUE 0 only
//   out         f32 [m][columns]                 columns: rows of the layer, or half of them (EPILOGUE 2)
//   PROLOGUE 0: x is codes.  1: x is normalized (RMSNorm, eps) and quantized (clip, A_BITS).  2: x is quantized.
//   EPILOGUE 0: out = y.  1: out += y.  2: of each tile, rows 0-7 are gate and rows 8-15 up: out = silu(gate) * up.
//   Limits: 1 <= m <= TOKENS (1 or 8); units even; k <= units * 128; k a multiple of 4, else loads
//   are slower; int32 sums, so k < 2^31 / 127^2.
//
// Every block owns whole tiles, all columns of them, so that sums never leave it. The tiles' units are one contiguous
// stream, cut evenly among the warps; a warp's part flows through its own ring in shared memory (bulk copies on sm_90,
// cp.async before), filled as far as it goes before the block waits for earlier kernels. Warps add their sums (integers:
// any order) in shared memory. PLANES 0: products by by_levels.cuh. 1: by by_planes.cuh, one token of 4 bits only.

#ifndef TOKENS
#error "TOKENS: 1 or 8"
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

#if PLANES
#include "by_planes.cuh"
#else
#include "by_levels.cuh"
#endif

#define WARPS 16
#define TRIGGER 5  // stages a warp has left when the next kernel may start: earlier, its weights delay this one's
#define RING_BYTES (WARPS * STAGES * STAGE_BYTES)

// ---- activations

// Codes of the tokens to code_MK (rows of `stride` bytes, zeros from k on) and their scales; whole block.
__device__ __forceinline__ void load_activations(const void* x, const float* x_scale_M, int m, int k, int padded, float clip,
                                                 float eps, i8* code_MK, int stride, float* scale_M, float* scratch) {
#if PROLOGUE == 0
    const uint4* from = (const uint4*)x;
    const int row = padded / 16;
    for (int i = threadIdx.x; i < m * row; i += blockDim.x)
        *(uint4*)(code_MK + (i / row) * stride + (i % row) * 16) = __ldcg(from + i);
    if (threadIdx.x < m) scale_M[threadIdx.x] = __ldcg(x_scale_M + threadIdx.x);
#else
    // A token belongs to WARPS / TOKENS warps; each of their lanes takes four neighbouring columns at a time, and keeps
    // the first HELD such vectors in registers: they are read once.
    constexpr int PER_TOKEN = WARPS / TOKENS, HELD = 4, STEP = 4 * 32 * PER_TOKEN;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, token = warp / PER_TOKEN, part = warp % PER_TOKEN;
    const float* const row = (const float*)x + (i64)token * k;
    const int first = token < m ? (part * 32 + lane) * 4 : padded;
    auto load = [&](int i) {
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
    };
    float sum = 0.0f, peak = 0.0f;
    auto measure = [&](float4 v) {
        sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        peak = max_or_nan(peak, max_or_nan(max_or_nan(fabsf(v.x), fabsf(v.y)), max_or_nan(fabsf(v.z), fabsf(v.w))));
    };
    float4 held[HELD];
#pragma unroll
    for (int j = 0; j < HELD; ++j) held[j] = load(first + j * STEP);
#pragma unroll
    for (int j = 0; j < HELD; ++j) measure(held[j]);
    for (int i = first + HELD * STEP; i < k; i += STEP) measure(load(i));
    sum = warp_sum(sum), peak = warp_max(peak);
    if (lane == 0) scratch[warp] = sum, scratch[WARPS + warp] = peak;
    __syncthreads();
    sum = 0.0f, peak = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_TOKEN; ++i) {
        sum += scratch[token * PER_TOKEN + i];
        peak = max_or_nan(peak, scratch[WARPS + token * PER_TOKEN + i]);
    }
    const float norm = PROLOGUE == 1 ? __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)k) + eps)) : 1.0f;
    const TokenScale t = token_scale(__fmul_rn(peak, norm), clip, A_BITS);  // rounding keeps the order: the peak stays it
    if (token < m && part == 0 && lane == 0) scale_M[token] = t.scale;
    auto store = [&](int i, float4 v) {
        char4 code;
        code.x = token_code(__fmul_rn(v.x, norm), t, A_BITS), code.y = token_code(__fmul_rn(v.y, norm), t, A_BITS);
        code.z = token_code(__fmul_rn(v.z, norm), t, A_BITS), code.w = token_code(__fmul_rn(v.w, norm), t, A_BITS);
        if (i < padded) *(char4*)(code_MK + token * stride + i) = code;
    };
#pragma unroll
    for (int j = 0; j < HELD; ++j) store(first + j * STEP, held[j]);
    for (int i = first + HELD * STEP; i < padded; i += STEP) store(i, load(i));
#endif
}

// ---- the kernel

extern "C" __global__ void __launch_bounds__(WARPS * 32, TOKENS == 1 ? 2 : 1)
    linear(const u8* unit_TU, const float* scale_R, const float* bias_R, const void* x, const float* x_scale_M, float* out,
           int m, int k, int columns, int tiles, int units, float clip, float eps) {
    extern __shared__ __align__(128) u8 memory[];
    const int warp = threadIdx.x >> 5;
    const int first = (int)((i64)blockIdx.x * tiles / gridDim.x), last = (int)((i64)(blockIdx.x + 1) * tiles / gridDim.x);
    const int owned = last - first, padded = units * 128, stride = padded + 16;
    i8* const code_MK = (i8*)(memory + RING_BYTES);
    int* const sums = (int*)(code_MK + TOKENS * stride);  // [owned * 16][TOKENS]
    float* const scales = (float*)(sums + owned * 16 * TOKENS);  // [owned * 16], then biases
    __shared__ u64 barriers[WARPS][STAGES];
    __shared__ float scratch[2 * WARPS], token_scales[TOKENS];
    u8* const product_scratch = (u8*)(scales + owned * 32);

    const int stages = units / STAGE_UNITS;  // of a tile
    const int begin = warp * owned * stages / WARPS, end = (warp + 1) * owned * stages / WARPS;
    Ring ring = {shared_address(memory) + warp * STAGES * STAGE_BYTES, shared_address(barriers[warp]),
                 unit_TU + ((i64)first * stages + begin) * STAGE_BYTES, end - begin};
    ring.start();
    if (end - begin <= TRIGGER) pdl_launch();
    for (int i = threadIdx.x; i < owned * 16 * TOKENS; i += blockDim.x) sums[i] = 0;
    for (int i = threadIdx.x; i < owned * 16; i += blockDim.x) {
        scales[i] = __ldg(scale_R + first * 16 + i);
        if (bias_R) scales[owned * 16 + i] = __ldg(bias_R + first * 16 + i);
    }
    pdl_wait();
    load_activations(x, x_scale_M, m, k, padded, clip, eps, code_MK, stride, token_scales, scratch);
    __syncthreads();

    Product product;
    product.prepare(code_MK, stride, m, units, product_scratch);
    __syncthreads();
    int tile = begin / stages, in_tile = stages - begin % stages;
    product.seek(stages - in_tile);
    for (int left = end - begin, parity = 0; left > 0; parity ^= 1) {
#pragma unroll
        for (int slot = 0; slot < STAGES; ++slot) {
            if (left > 0) {
                ring.wait(slot, parity);
                product.add(ring.buffer + slot * STAGE_BYTES);
                __syncwarp();
                ring.request(slot);
                if (--in_tile == 0) {
                    product.flush(sums + tile * 16 * TOKENS);
                    product.seek(0);
                    in_tile = stages, ++tile;
                }
                if (--left == TRIGGER) pdl_launch();
            }
        }
    }
    if (in_tile != stages) product.flush(sums + tile * 16 * TOKENS);
    __syncthreads();

    const int rows = EPILOGUE == 2 ? 8 : 16;  // of a tile, in out
    for (int i = threadIdx.x; i < owned * rows * m; i += blockDim.x) {
        const int token = i / (owned * rows), local = i % (owned * rows);
        const int row = (local / rows) * 16 + local % rows, column = first * rows + local;
        if (column >= columns) continue;
        auto value = [&](int r) {
            const float y = __fmul_rn(__fmul_rn((float)sums[r * TOKENS + token], token_scales[token]), scales[r]);
            return bias_R ? __fadd_rn(y, scales[owned * 16 + r]) : y;
        };
        float* const to = out + (i64)token * columns + column;
#if EPILOGUE == 2
        const float gate = value(row), up = value(row + 8);
        *to = __fmul_rn(__fdiv_rn(gate, 1.0f + expf(-gate)), up);
#elif EPILOGUE == 1
        *to = __fadd_rn(__ldcg(to), value(row));
#else
        *to = value(row);
#endif
    }
}
