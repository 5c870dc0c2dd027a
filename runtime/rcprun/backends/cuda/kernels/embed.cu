// Embedding (SPEC.md, "Embedding"): x[m] = table[id[m]], as float32.
//
//   ids    i32   [M]        an id outside 0..V-1 gives a row of NaN, so that a failed choice stays visible
//   table  i8    [V][D]     embed_int8, with
//   scale  f32   [V]        its row scales; or
//   table  f16   [V][D]     embed_half
//   x      f32   [M][D]     out
//
// Grid (ceil(D / (RCP_THREADS * RCP_STRIDES)), M), block RCP_THREADS. Any V, D and M up to 65,535.
#include "common.cuh"

#ifndef RCP_THREADS
#error "RCP_THREADS: threads in a block"
#endif
#ifndef RCP_STRIDES
#error "RCP_STRIDES: channels that a thread computes"
#endif

template <class Value>
__device__ __forceinline__ void embed(const i32* ids, i32 V, i32 D, float* x, Value value) {
    pdl_launch();
    const i32 id = ids[blockIdx.y];
    const bool known = id >= 0 && id < V;
    const i32 first = blockIdx.x * RCP_THREADS * RCP_STRIDES + threadIdx.x;
#pragma unroll
    for (int i = 0; i < RCP_STRIDES; ++i) {
        const i32 d = first + i * RCP_THREADS;
        if (d < D) x[(i64)blockIdx.y * D + d] = known ? value(id, (i64)id * D + d) : __int_as_float(0x7fc00000);
    }
}

extern "C" __global__ void __launch_bounds__(RCP_THREADS)
    embed_int8(const i32* ids, const i8* table, const float* scale, float* x, i32 V, i32 D) {
    embed(ids, V, D, x, [=](i32 id, i64 place) { return __fmul_rn((float)table[place], scale[id]); });
}

extern "C" __global__ void __launch_bounds__(RCP_THREADS)
    embed_half(const i32* ids, const u16* table, float* x, i32 V, i32 D) {
    embed(ids, V, D, x, [=](i32, i64 place) { return float_from_half(table[place]); });
}
