// Integer sums of many tokens to floats (SPEC.md, "Linear"), as the end of linear.cu does it for few.
//
//   sum_MR      i32 [m][rows]      rows: tiles * 16, in the order of the tiles
//   x_scale_M   f32 [m];  scale_R  f32 [rows];  bias_R  f32 [rows] or null
//   out         f32 [m][columns];  EPILOGUE as in linear.cu
//
// A thread does four neighbouring columns of TOKENS tokens: sums, and where WHOLE says that columns are a multiple of four,
// floats too, come in vectors, all of them before the first is used.
// Grid: (ceil(columns / 4 THREADS), ceil(m / TOKENS)).

#include "rescale.cuh"

#ifndef EPILOGUE
#error "EPILOGUE: 0, 1 or 2"
#endif
#ifndef WHOLE
#error "WHOLE: 1 where columns are a multiple of 4, else 0"
#endif

constexpr int THREADS = 256;
constexpr int TOKENS = EPILOGUE == 0 ? 8 : 4;  // of a thread: of 8 loads, where gate and up or the residual come too

extern "C" __global__ void __launch_bounds__(THREADS)
    rescale(const int* sum_MR, const float* x_scale_M, const float* scale_R, const float* bias_R, float* out, int m,
            int rows, int columns) {
    const int column = (blockIdx.x * THREADS + threadIdx.x) * 4, token = blockIdx.y * TOKENS;
    pdl_launch();
    pdl_wait();
    if (column >= columns) return;
#if EPILOGUE == 2
    const int row = gate_row(column);
    const Rows up_rows(scale_R, bias_R, row + 8);
    int4 up_sum[TOKENS];
#else
    const int row = column;
#endif
    const Rows these(scale_R, bias_R, row);
    int4 sum[TOKENS];
    float x_scale[TOKENS];
#if EPILOGUE == 1 && WHOLE
    float4 before[TOKENS];
#endif
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
        const i64 from = min(token + i, m - 1);
        sum[i] = __ldcs((const int4*)(sum_MR + from * rows + row));
        x_scale[i] = x_scale_M[from];
#if EPILOGUE == 2
        up_sum[i] = __ldcs((const int4*)(sum_MR + from * rows + row + 8));
#endif
#if EPILOGUE == 1 && WHOLE
        before[i] = *(const float4*)(out + from * columns + column);
#endif
    }
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
        if (token + i >= m) return;
        float* const to = out + (i64)(token + i) * columns + column;
        float4 y = these(sum[i], x_scale[i]);
#if EPILOGUE == 2
        y = silu_times(y, up_rows(up_sum[i], x_scale[i]));
#endif
#if WHOLE
#if EPILOGUE == 1
        y = Rows::plus(before[i], y);
#endif
        *(float4*)to = y;
#else
        const float each[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (column + c < columns) to[c] = EPILOGUE == 1 ? __fadd_rn(to[c], each[c]) : each[c];
#endif
    }
}
