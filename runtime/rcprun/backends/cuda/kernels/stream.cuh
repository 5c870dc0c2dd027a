// Weights on their way through shared memory: each warp reads one contiguous stream of units through a ring of its own.
//
// STAGES slots of STAGE_UNITS units a warp; bulk copies with a barrier a slot on sm_90, cp.async before.
#pragma once

#include "units.cuh"

#ifndef SLOTS
#error "SLOTS: of each warp's ring"
#endif

#ifndef PACED
#error "PACED: 1 while an earlier kernel runs: what it still reads would wait behind all that is asked for at once; else 0"
#endif

#define STAGE_UNITS 2
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)

// The stream of one warp, a stage at a time, through SLOTS slots at `buffer` (each with a barrier at `barriers`).
struct Ring {
    u32 buffer, barriers;
    const u8* from;
    int left;  // stages not asked for yet; on sm_90, in lane 0 only: it asks for all
    u32 at = 0, barrier = 0, parity = 0;  // of the slot in turn: where it and its barrier lie, and its round

    // Ask for the next stage, into the slot in turn, whose bytes are used up, and turn to the one after it.
    __device__ __forceinline__ void next() {
#if RCP_HOPPER
        if (left > 0) {
            barrier_expect<STAGE_BYTES>(barriers + barrier);
            copy_bulk<STAGE_BYTES>(buffer + at, from, barriers + barrier);
            --left, from += STAGE_BYTES;
        }
#else
        if (left > 0)
            for (int i = (threadIdx.x & 31) * 16; i < STAGE_BYTES; i += 512) copy_async(buffer + at + i, from + i);
        commit_copies();
        --left, from += STAGE_BYTES;
#endif
        at += STAGE_BYTES, barrier += 8;
        if (barrier == 8 * SLOTS) at = barrier = 0, parity ^= 1;
    }
    // Fill all slots. PACED: on sm_90 one stage at a time, each when the one before has come.
    __device__ __forceinline__ void start() {
#if RCP_HOPPER
        if ((threadIdx.x & 31) == 0) {
            for (int i = 0; i < SLOTS; ++i) barrier_init(barriers + i * 8);
            barrier_init_done();
        } else {
            left = 0;
        }
        __syncwarp();
#endif
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
#if RCP_HOPPER && PACED
            if (i > 0 && left > 0) barrier_wait(barriers + barrier - 8, 0);
#endif
            next();
        }
        parity = 0;
        __syncwarp();
    }
    // Wait until the bytes of the slot in turn are there for every lane; where they are.
    __device__ __forceinline__ u32 wait() const {
#if RCP_HOPPER
        barrier_wait(barriers + barrier, parity);
#else
        wait_for_copies<SLOTS - 1>();
        __syncwarp();
#endif
        return buffer + at;
    }
};
