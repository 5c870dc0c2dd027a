// What many tokens' integer sums become: floats (SPEC.md, "Linear"), each operation rounded by itself.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float rescaled(int sum, float x_scale, float scale) {
    return __fmul_rn(__fmul_rn((float)sum, x_scale), scale);
}
__device__ __forceinline__ float4 rescaled(const int4& sum, float x_scale, const float* scale) {
    return {rescaled(sum.x, x_scale, scale[0]), rescaled(sum.y, x_scale, scale[1]), rescaled(sum.z, x_scale, scale[2]),
            rescaled(sum.w, x_scale, scale[3])};
}

// Of four neighbouring rows of a layer: scales, and biases where there are any.
struct Rows {
    float4 scale, bias;
    bool biased;

    __device__ __forceinline__ Rows(const float* scale_R, const float* bias_R, int row)
        : scale(*(const float4*)(scale_R + row)), bias(), biased(bias_R) {
        if (biased) bias = *(const float4*)(bias_R + row);
    }
    __device__ __forceinline__ float4 operator()(const int4& sum, float x_scale) const {
        float4 y = {rescaled(sum.x, x_scale, scale.x), rescaled(sum.y, x_scale, scale.y), rescaled(sum.z, x_scale, scale.z),
                    rescaled(sum.w, x_scale, scale.w)};
        if (biased) y = plus(y, bias);
        return y;
    }
    static __device__ __forceinline__ float4 plus(const float4& a, const float4& b) {
        return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w)};
    }
};

// Of gate and up rows interleaved by eight: where those of a column, a multiple of four, begin; up's are eight later.
__device__ __forceinline__ int gate_row(int column) { return column / 8 * 16 + column % 8; }

// Divided within two units of the last place, as exp is; an exact division takes five times as many instructions. 0 where
// exp(-gate) is 2^126 or more.
__device__ __forceinline__ float silu_times(float gate, float up) {
    return __fmul_rn(__fmul_rn(gate, reciprocal(1.0f + expf(-gate))), up);
}
__device__ __forceinline__ float4 silu_times(const float4& gate, const float4& up) {
    return {silu_times(gate.x, up.x), silu_times(gate.y, up.y), silu_times(gate.z, up.z), silu_times(gate.w, up.w)};
}
