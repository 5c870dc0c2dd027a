// Integer sums of many tokens to floats (SPEC.md, "Linear"), as the end of linear.cu does it for few.
//
//   sum_MR      i32 [m][rows]      rows: tiles * 16, in the order of the tiles
//   x_scale_M   f32 [m];  scale_R  f32 [rows];  bias_R  f32 [rows] or null
//   out         f32 [m][columns];  EPILOGUE as in linear.cu
//   Grid: (blocks over columns, m).

#include "common.cuh"

#ifndef EPILOGUE
#error "EPILOGUE: 0, 1 or 2"
#endif

extern "C" __global__ void rescale(const int* sum_MR, const float* x_scale_M, const float* scale_R, const float* bias_R,
                                   float* out, int rows, int columns) {
    pdl_launch();
    pdl_wait();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    const i64 token = blockIdx.y;
    if (column >= columns) return;
    const float x_scale = x_scale_M[token];
    auto value = [&](int r) {
        const float y = __fmul_rn(__fmul_rn((float)sum_MR[token * rows + r], x_scale), scale_R[r]);
        return bias_R ? __fadd_rn(y, bias_R[r]) : y;
    };
    float* const to = out + token * columns + column;
#if EPILOGUE == 2
    const int row = (column / 8) * 16 + column % 8;
    const float gate = value(row), up = value(row + 8);
    *to = __fmul_rn(__fdiv_rn(gate, 1.0f + expf(-gate)), up);
#elif EPILOGUE == 1
    *to = __fadd_rn(*to, value(column));
#else
    *to = value(column);
#endif
}
