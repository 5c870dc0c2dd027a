// What CUDA C++ has no name for, by inline PTX, which is nowhere else: tests put plain C++ in this file's place and run
// the kernels on a CPU.
#pragma once
#include "types.cuh"

// ---- Programmatic dependent launch. Everything before pdl_wait may run while earlier kernels still do: it may read
// weights and constants only. pdl_launch lets the next kernel start; both are nothing where there is no such launch.

__device__ __forceinline__ void pdl_wait() {
#if RCP_HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_launch() {
#if RCP_HOPPER
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Floats

// binary16, as its bits; two of them, as a word.
__device__ __forceinline__ u16 half_from_float(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
__device__ __forceinline__ float float_from_half(u16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}
__device__ __forceinline__ u32 half_pair(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
__device__ __forceinline__ u32 add_half2(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 multiply_add_half2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// The larger one; NaN where either is, so that a token with one is refused in the end, not taken for another.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
__device__ __forceinline__ float exp2_approx(float x) {  // relative error 2^-22
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {  // within one unit of the last place; 0 from 2^126 on
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- Words

// (word & mask) | bits, in one instruction; of the plain form with two constants the compiler makes two.
__device__ __forceinline__ u32 masked_or(u32 word, u32 mask, u32 bits) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
    return result;
}
// x, of which the compiler knows nothing more: it keeps it in a register and does not compute it anew in a loop.
__device__ __forceinline__ u32 kept(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
// Of four bytes, those that the nibbles of the lower half of `selectors` select (0 to 3). __byte_perm would mask the
// selectors once more, and plain shifts would be undone by the compiler, which prefers to mask and shift each half by
// itself. Either costs a fifth of the loop.
__device__ __forceinline__ u32 look_up(u32 bytes, u32 selectors) {
    u32 y;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(bytes), "r"(selectors));
    return y;
}
__device__ __forceinline__ u32 upper_half(u32 x) {
    u32 y;
    asm("shr.u32 %0, %1, 16;" : "=r"(y) : "r"(x));
    return y;
}
// sum + the four uint8 of `counts` times the four int8 of `bytes`.
__device__ __forceinline__ int dot(u32 counts, u32 bytes, int sum) {
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(counts), "r"(bytes));
    return sum;
}

// ---- Products of matrices, by a warp: c += a b, a 16 x K, b K x 8. With g = lane / 4, t = lane % 4 and E elements to a
// register, K = 8 E: a = (row g, k E t), (g + 8, E t), (g, E (t + 4)), (g + 8, E (t + 4)), each with the E - 1 next k;
// b = (k E t, column g), (E (t + 4), g); c = (row g, columns 2t, 2t + 1), (g + 8, the same).

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // f16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(i32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // int8
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Of single bits: how many a row and a column share. Not added to anything.
__device__ __forceinline__ int4 mma_bits(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    int4 d;
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
    return d;
}

// ---- Memory. Shared memory by its 32-bit addresses, which saves loops the conversions from pointers.

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint2 load2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}
__device__ __forceinline__ uint4 load4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ void store1(u32 address, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
// One or two registers of b of mma from 16 rows of 8 or 16 bf16 or f16 in shared memory, row-major. address: of row
// lane % 16, and for two, of column 8 (lane / 16); a multiple of 16.
__device__ __forceinline__ void load_b(u32& b0, u32& b1, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b0), "=r"(b1) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_b(u32& b0, u32& b1, u32& next_b0, u32& next_b1, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b0), "=r"(b1), "=r"(next_b0), "=r"(next_b1) : "r"(address) : "memory");
}
// From global memory that no one writes, and which is not read again soon.
__device__ __forceinline__ uint4 load_once(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// Asked for where it is written; the compilers move plain loads to below branches and other loads.
__device__ __forceinline__ float load_now(const float* address) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ i32 load_now(const i32* address) {
    i32 v;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ int4 load_now(const int4* address) {
    int4 v;
    asm volatile("ld.relaxed.gpu.global.v4.s32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
    return v;
}

// Several floats, each of which is whole by itself; not all of them need be of the same time.
__device__ __forceinline__ float2 load_now(const float2* address) {
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ float4 load_now(const float4* address) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ void store_now(float2* address, float2 v) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(address), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void store_now(float4* address, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};"
                 ::"l"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// 16 bytes from global to shared memory, later; a thread commits what it asked for as a group, and waits until all
// groups but the latest LEFT have come.
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

#if RCP_HOPPER
// ---- Barriers of 64 bits in shared memory that count bytes, and what they count.

// For some arrivals; that of barrier_expect says how many bytes are to come besides.
__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A barrier of the first THREADS threads of a block.
template <int THREADS>
__device__ __forceinline__ void sync_some() {
    asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
template <int BYTES>
__device__ __forceinline__ void barrier_expect(u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// Whether a wait would be over.
__device__ __forceinline__ bool barrier_passed(u32 barrier, int parity) {
    u32 passed;
    asm volatile("{ .reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
                 : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    return passed;
}
template <int BYTES>
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "n"(BYTES), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// One, two or four words to where `to` is in a block of the cluster, counted by what `barrier` is there.
__device__ __forceinline__ void store_to_block(u32 block, u32 to, u32 barrier, u32 value) {
    asm volatile("{ .reg .b32 to, bar; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 bar, %1, %2;"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [bar]; }"
                 ::"r"(to), "r"(barrier), "r"(block), "r"(value) : "memory");
}
__device__ __forceinline__ void store_to_block(u32 block, u32 to, u32 barrier, float2 v) {
    asm volatile("{ .reg .b32 to, bar; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 bar, %1, %2;"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3,%4}, [bar]; }"
                 ::"r"(to), "r"(barrier), "r"(block), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void store_to_block(u32 block, u32 to, u32 barrier, const float4& v) {
    asm volatile("{ .reg .b32 to, bar; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 bar, %1, %2;"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3,%4,%5,%6}, [bar]; }"
                 ::"r"(to), "r"(barrier), "r"(block), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// Two words, without a barrier, which cluster_arrive_release and cluster_wait make visible there.
__device__ __forceinline__ void store_to_block(u32 block, u32 to, u64 value) {
    asm volatile("{ .reg .b32 to; mapa.shared::cluster.u32 to, %0, %1; st.shared::cluster.u64 [to], %2; }"
                 ::"r"(to), "r"(block), "l"(value) : "memory");
}
__device__ __forceinline__ void cluster_arrive_release() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#endif
