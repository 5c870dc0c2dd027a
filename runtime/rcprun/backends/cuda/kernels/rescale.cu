// Integer sums of many tokens to floats (SPEC.md, "Linear"), as the end of linear.cu does it for few.
//
//   sum_MR      i32 [m][rows]      rows: tiles * 16, in the order of the tiles
//   x_scale_M   f32 [m];  scale_R  f32 [rows];  bias_R  f32 [rows] or null
//   out         f32 [m][columns];  EPILOGUE as in linear.cu
//   A thread does four neighbouring columns of a token: rows, and where they are the layer's columns too, come in
//   vectors. Grid: (blocks over columns / 4, m).

#include "common.cuh"

#ifndef EPILOGUE
#error "EPILOGUE: 0, 1 or 2"
#endif

__device__ __forceinline__ float4 scaled(const int* sum_R, float x_scale, const float* scale_R, const float* bias_R, int row) {
    const int4 sum = *(const int4*)(sum_R + row);
    const float4 scale = *(const float4*)(scale_R + row);
    float4 y = {__fmul_rn(__fmul_rn((float)sum.x, x_scale), scale.x), __fmul_rn(__fmul_rn((float)sum.y, x_scale), scale.y),
                __fmul_rn(__fmul_rn((float)sum.z, x_scale), scale.z), __fmul_rn(__fmul_rn((float)sum.w, x_scale), scale.w)};
    if (bias_R) {
        const float4 bias = *(const float4*)(bias_R + row);
        y.x = __fadd_rn(y.x, bias.x), y.y = __fadd_rn(y.y, bias.y), y.z = __fadd_rn(y.z, bias.z), y.w = __fadd_rn(y.w, bias.w);
    }
    return y;
}

__device__ __forceinline__ float silu_times(float gate, float up) {
    return __fmul_rn(__fdiv_rn(gate, 1.0f + expf(-gate)), up);
}

extern "C" __global__ void rescale(const int* sum_MR, const float* x_scale_M, const float* scale_R, const float* bias_R,
                                   float* out, int rows, int columns) {
    pdl_launch();
    pdl_wait();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    const i64 token = blockIdx.y;
    if (column >= columns) return;
    const int* const sum_R = sum_MR + token * rows;
    const float x_scale = x_scale_M[token];
#if EPILOGUE == 2
    const int row = (column / 8) * 16 + column % 8;
    const float4 gate = scaled(sum_R, x_scale, scale_R, bias_R, row);
    const float4 up = scaled(sum_R, x_scale, scale_R, bias_R, row + 8);
    float4 y = {silu_times(gate.x, up.x), silu_times(gate.y, up.y), silu_times(gate.z, up.z), silu_times(gate.w, up.w)};
#else
    float4 y = scaled(sum_R, x_scale, scale_R, bias_R, column);
#endif
    float* const to = out + token * columns + column;
    if ((columns & 3) == 0) {
#if EPILOGUE == 1
        const float4 x = *(const float4*)to;
        y.x = __fadd_rn(x.x, y.x), y.y = __fadd_rn(x.y, y.y), y.z = __fadd_rn(x.z, y.z), y.w = __fadd_rn(x.w, y.w);
#endif
        *(float4*)to = y;
        return;
    }
    const float each[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (column + i < columns) to[i] = EPILOGUE == 1 ? __fadd_rn(to[i], each[i]) : each[i];
}
