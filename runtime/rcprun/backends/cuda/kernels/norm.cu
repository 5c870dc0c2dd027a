// RMSNorm and quantization of activations (SPEC.md, "RMSNorm" and "Activations"), one block a row.
//
//   x      f32  [M][RCP_K]
//   codes  i8   [M][kpad]   out; kpad a multiple of 4, bytes from RCP_K on are not touched
//   scale  f32  [M]         out; NaN where x holds one
//   out    f32  [M][RCP_K]  out of `normalize`
//   bits   4 or 8
// `add_norm_quantize` first adds a linear layer's output to x, in place; it comes as integer sums, see rescale.cu:
//   sum_MR  i32  [M][rows]   rows: a multiple of 16, from RCP_K on;  scale_R, bias_R  f32 [rows], bias_R or null
//   scale is of the sums' input before it is of the codes.
//
// A row lives in registers, RCP_K / RCP_THREADS floats a thread: meant for up to 48, right for any number. Codes are
// those of the normalized floats: x ↦ round(x · inverse root) is monotone, so that the largest normalized magnitude
// is the largest magnitude, normalized.
#include "rescale.cuh"

#ifndef RCP_K
#error "RCP_K: channels"
#endif
#ifndef RCP_THREADS
#error "RCP_THREADS: threads in a block, a multiple of 32"
#endif

constexpr int WIDTH = RCP_K % 4 ? 1 : 4;  // floats of a load: rows are aligned to 16 bytes if RCP_K is a multiple of 4
constexpr int VECTORS = RCP_K / WIDTH;
constexpr int TURNS = (VECTORS + RCP_THREADS - 1) / RCP_THREADS;

// Whether a thread's vector number i is one of the row; known to the compiler for rows that fill all turns.
__device__ __forceinline__ bool is_there(int i) {
    return VECTORS >= (i + 1) * RCP_THREADS || threadIdx.x + i * RCP_THREADS < VECTORS;
}

// The vectors of one row that this thread holds: number threadIdx.x, + RCP_THREADS, …; zeros after the last.
struct Row {
    float x[TURNS][WIDTH];

    __device__ __forceinline__ void load(const float* row) {
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const int v = threadIdx.x + i * RCP_THREADS;
            if constexpr (WIDTH == 4) {
                const float4 four = is_there(i) ? ((const float4*)row)[v] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
            } else {
                x[i][0] = is_there(i) ? row[v] : 0.0f;
            }
        }
    }

    // Adds what the sums of a token become, all of which are asked for before one is used.
    __device__ __forceinline__ void add(const int* sum, float x_scale, const float* scale_R, const float* bias_R) {
        int sums[TURNS][WIDTH];
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const int v = threadIdx.x + i * RCP_THREADS;
            if (!is_there(i)) continue;
            if constexpr (WIDTH == 4) {
                const int4 four = __ldcs((const int4*)sum + v);
                sums[i][0] = four.x, sums[i][1] = four.y, sums[i][2] = four.z, sums[i][3] = four.w;
            } else {
                sums[i][0] = sum[v];
            }
        }
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const int v = threadIdx.x + i * RCP_THREADS;
            if (!is_there(i)) continue;
            if constexpr (WIDTH == 4) {
                const Rows rows(scale_R, bias_R, 4 * v);
                const int4 four = {sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
                const float4 all = Rows::plus({x[i][0], x[i][1], x[i][2], x[i][3]}, rows(four, x_scale));
                x[i][0] = all.x, x[i][1] = all.y, x[i][2] = all.z, x[i][3] = all.w;
            } else {
                const float y = rescaled(sums[i][0], x_scale, scale_R[v]);
                x[i][0] = __fadd_rn(x[i][0], bias_R ? __fadd_rn(y, bias_R[v]) : y);
            }
        }
    }

    __device__ __forceinline__ void store(float* row) const {
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const int v = threadIdx.x + i * RCP_THREADS;
            if (!is_there(i)) continue;
            if constexpr (WIDTH == 4)
                ((float4*)row)[v] = {x[i][0], x[i][1], x[i][2], x[i][3]};
            else
                row[v] = x[i][0];
        }
    }
};

struct Statistics {
    float squares, peak;  // Σ x² and max |x|; squares is NaN if any x is
};

// The same value in every thread.
__device__ __forceinline__ Statistics statistics(const Row& row) {
    __shared__ float squares_of[32], peak_of[32];
    Statistics s = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            s.squares = fmaf(row.x[i][j], row.x[i][j], s.squares);
            s.peak = fmaxf(s.peak, fabsf(row.x[i][j]));
        }
    }
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    s = {warp_sum(s.squares), warp_max(s.peak)};
    if (lane == 0) squares_of[warp] = s.squares, peak_of[warp] = s.peak;
    __syncthreads();
    const bool there = lane < RCP_THREADS / 32;
    return {warp_sum(there ? squares_of[lane] : 0.0f), warp_max(there ? peak_of[lane] : 0.0f)};
}

__device__ __forceinline__ float inverse_root(float squares, float eps) {
    const float mean = __fdiv_rn(squares, (float)RCP_K);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

// Quantizes row · factor, whose largest magnitude is `peak`.
__device__ __forceinline__ void quantize_row(
    const Row& row, float factor, float peak, i8* codes, float* scale, float clip, i32 bits) {
    const TokenScale token = token_scale(peak, clip, bits);
    if (threadIdx.x == 0) *scale = token.scale;
    const Coder coder(token, bits);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        const int v = threadIdx.x + i * RCP_THREADS;
        if (!is_there(i)) continue;
        if constexpr (WIDTH == 4) {
            const float y[4] = {__fmul_rn(row.x[i][0], factor), __fmul_rn(row.x[i][1], factor),
                                __fmul_rn(row.x[i][2], factor), __fmul_rn(row.x[i][3], factor)};
            ((u32*)codes)[v] = coder.four(y);
        } else {
            codes[v] = (i8)coder.code(__fmul_rn(row.x[i][0], factor));
        }
    }
}

extern "C" __global__ void __launch_bounds__(RCP_THREADS)
    norm_quantize(const float* x, i8* codes, float* scale, i32 kpad, float eps, float clip, i32 bits) {
    pdl_launch();
    pdl_wait_together();
    Row row;
    row.load(x + (i64)blockIdx.x * RCP_K);
    const Statistics s = statistics(row);
    const float factor = inverse_root(s.squares, eps);
    i8* const out = codes + (i64)blockIdx.x * kpad;
    quantize_row(row, factor, __fmul_rn(s.peak, factor), out, scale + blockIdx.x, clip, bits);
}

extern "C" __global__ void __launch_bounds__(RCP_THREADS)
    add_norm_quantize(const i32* sum_MR, const float* scale_R, const float* bias_R, float* x, i8* codes, float* scale, i32 rows,
                      i32 kpad, float eps, float clip, i32 bits) {
    pdl_launch();
    pdl_wait_together();
    Row row;
    float* const place = x + (i64)blockIdx.x * RCP_K;
    row.load(place);
    row.add(sum_MR + (i64)blockIdx.x * rows, scale[blockIdx.x], scale_R, bias_R);
    row.store(place);
    const Statistics s = statistics(row);  // all threads have the scale before one replaces it
    const float factor = inverse_root(s.squares, eps);
    i8* const out = codes + (i64)blockIdx.x * kpad;
    quantize_row(row, factor, __fmul_rn(s.peak, factor), out, scale + blockIdx.x, clip, bits);
}

extern "C" __global__ void __launch_bounds__(RCP_THREADS)
    quantize(const float* x, i8* codes, float* scale, i32 kpad, float clip, i32 bits) {
    pdl_launch();
    pdl_wait_together();
    Row row;
    row.load(x + (i64)blockIdx.x * RCP_K);
    const Statistics s = statistics(row);
    const float peak = s.squares == s.squares ? s.peak : s.squares;
    quantize_row(row, 1.0f, peak, codes + (i64)blockIdx.x * kpad, scale + blockIdx.x, clip, bits);
}

extern "C" __global__ void __launch_bounds__(RCP_THREADS) normalize(const float* x, float* out, float eps) {
    pdl_launch();
    pdl_wait_together();
    Row row;
    row.load(x + (i64)blockIdx.x * RCP_K);
    const float factor = inverse_root(statistics(row).squares, eps);
    float* const place = out + (i64)blockIdx.x * RCP_K;
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        const int v = threadIdx.x + i * RCP_THREADS;
        if (!is_there(i)) continue;
        float y[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) y[j] = __fmul_rn(row.x[i][j], factor);
        if constexpr (WIDTH == 4)
            ((float4*)place)[v] = make_float4(y[0], y[1], y[2], y[3]);
        else
            place[v] = y[0];
    }
}
