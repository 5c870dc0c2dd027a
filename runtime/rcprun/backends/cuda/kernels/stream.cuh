// Weights on their way through shared memory: each warp reads one contiguous stream of units through a ring of its own.
//
// STAGES slots of STAGE_UNITS units a warp; bulk copies with a barrier a slot on sm_90, cp.async before. Shared memory is
// addressed by its 32-bit addresses, which saves the inner loop the conversions from pointers.
#pragma once

#include "units.cuh"

#ifndef STAGES
#error "STAGES: of each warp's ring"
#endif

#define STAGE_UNITS 2
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ uint4 load4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ u32 load1(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ uint2 load2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

// The stream of one warp, a stage at a time, through STAGES slots at `buffer` (each with a barrier at `barriers`).
struct Ring {
    u32 buffer, barriers;
    const u8* from;
    int left;  // stages not asked for yet; on sm_90, in lane 0 only: it asks for all

    // Ask for the next stage, into a slot whose bytes are used up.
    __device__ __forceinline__ void request(int slot) {
#if RCP_HOPPER
        if (left > 0) {
            asm volatile(
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %2;\n"
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%1], [%3], %2, [%0];" ::"r"(
                    barriers + slot * 8),
                "r"(buffer + slot * STAGE_BYTES), "n"(STAGE_BYTES), "l"(from)
                : "memory");
        }
#else
        if (left > 0)
            for (int i = (threadIdx.x & 31) * 16; i < STAGE_BYTES; i += 512)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(buffer + slot * STAGE_BYTES + i), "l"(from + i)
                             : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
        --left;
        from += STAGE_BYTES;
    }
    __device__ __forceinline__ void start() {
#if RCP_HOPPER
        if ((threadIdx.x & 31) == 0) {
            for (int i = 0; i < STAGES; ++i)
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        } else {
            left = 0;
        }
        __syncwarp();
#endif
#pragma unroll
        for (int i = 0; i < STAGES; ++i) request(i);
    }
    // Wait until the bytes of a slot are there for every lane. Slots come round in order; parity: of the round.
    __device__ __forceinline__ void wait(int slot, int parity) const {
#if RCP_HOPPER
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(barriers + slot * 8),
            "r"(parity)
            : "memory");
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        __syncwarp();
#endif
    }
};
