// Weights on their way through shared memory: each warp reads one contiguous stream of units through a ring of its own.
//
// STAGES slots of STAGE_UNITS units a warp; bulk copies with a barrier a slot on sm_90, cp.async before.
#pragma once

#include "units.cuh"

#ifndef STAGES
#error "STAGES: of each warp's ring"
#endif

#define STAGE_UNITS 2
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)

// The stream of one warp, a stage at a time, through STAGES slots at `buffer` (each with a barrier at `barriers`).
struct Ring {
    u32 buffer, barriers;
    const u8* from;
    int left;  // stages not asked for yet; on sm_90, in lane 0 only: it asks for all

    // Ask for the next stage, into a slot whose bytes are used up.
    __device__ __forceinline__ void request(int slot) {
#if RCP_HOPPER
        if (left > 0) {
            barrier_expect<STAGE_BYTES>(barriers + slot * 8);
            copy_bulk<STAGE_BYTES>(buffer + slot * STAGE_BYTES, from, barriers + slot * 8);
        }
#else
        if (left > 0)
            for (int i = (threadIdx.x & 31) * 16; i < STAGE_BYTES; i += 512)
                copy_async(buffer + slot * STAGE_BYTES + i, from + i);
        commit_copies();
#endif
        --left;
        from += STAGE_BYTES;
    }
    __device__ __forceinline__ void start() {
#if RCP_HOPPER
        if ((threadIdx.x & 31) == 0) {
            for (int i = 0; i < STAGES; ++i) barrier_init(barriers + i * 8);
            barrier_init_done();
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
        barrier_wait(barriers + slot * 8, parity);
#else
        wait_for_copies<STAGES - 1>();
        __syncwarp();
#endif
    }
};
