// The largest magnitude of a token, as the bits of that float: they are in the order of magnitudes, above them infinity
// and then NaN. So a NaN makes the peak, the scale and all that follows NaN, as in NumPy, where fmaxf would lose it.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Over all threads of a block (a multiple of 32, at most 1,024), in every thread. scratch: 32 words, not free again
// before the next __syncthreads.
__device__ __forceinline__ u32 block_peak(u32 peak, u32* scratch) {
    const int lane = threadIdx.x & 31;
    peak = __reduce_max_sync(FULL_MASK, peak);
    if (lane == 0) scratch[threadIdx.x >> 5] = peak;
    __syncthreads();
    return __reduce_max_sync(FULL_MASK, lane < blockDim.x >> 5 ? scratch[lane] : 0);
}
