// Reads memory and keeps next to nothing of it: how fast this GPU can read.
//   data  uint4 [count];  out  u32 [1], written only if all bits of the sum are ones, which keeps the loads alive

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(512) bandwidth(const uint4* data, i64 count, u32* out) {
    u32 sum = 0;
    const i64 stride = (i64)gridDim.x * blockDim.x;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < count; i += 4 * stride) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < count; i += stride) sum += data[i].x;
    if (sum == 0xffffffffu) *out = sum;
}
