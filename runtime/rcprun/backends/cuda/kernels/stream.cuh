// Weights on their way through shared memory: what a block's warps need next is one piece (units.cuh), and passes through
// one of SLOTS slots.
//
// On sm_90 a warp of its own asks for the pieces by bulk copies: while slots are free, and at most FLIGHT pieces at a
// time, or fewer before the activations are there: what is asked for beyond that comes no sooner, but all that others
// read then waits behind it. Before sm_90, each warp copies its own part of a piece by cp.async.
#pragma once

#include "units.cuh"

#ifndef SLOTS
#error "SLOTS: pieces in shared memory"
#endif

#ifndef FLIGHT
#error "FLIGHT: pieces that are asked for at a time on sm_90, at most SLOTS"
#endif

#define PIECE_BYTES (STREAMS * STAGE_BYTES)
#define FETCHING_WARPS RCP_HOPPER  // beside the STREAMS warps that compute

struct Stream {
    u32 buffer, full, empty;  // slots, and their barriers
    int slot, parity;         // in turn, and its round

#if RCP_HOPPER
    // By the fetching warp's only thread, of `rounds` pieces of which the last has `last` stages; at most `early` at a time
    // until the barrier `hurry` has been passed.
    __device__ __forceinline__ void fetch(const u8* from, int rounds, int last, int early, u32 hurry) {
        int turn = 0, landed = 0, landing = 0, landing_parity = 0;  // landing: the slot of the first piece under way
        parity = 1;
        for (int round = 0; round < rounds; ++round) {
            if (round >= SLOTS) barrier_wait(empty + turn * 8, parity);
            while (round - landed >= (early == FLIGHT || barrier_passed(hurry, 0) ? FLIGHT : early)) {
                barrier_wait(full + landing * 8, landing_parity);
                ++landed;
                if (++landing == SLOTS) landing = 0, landing_parity ^= 1;
            }
            const u32 bytes = round == rounds - 1 ? last * STAGE_BYTES : PIECE_BYTES;
            barrier_expect(full + turn * 8, bytes);
            copy_bulk(buffer + turn * PIECE_BYTES, from, bytes, full + turn * 8);
            from += PIECE_BYTES;
            if (++turn == SLOTS) turn = 0, parity ^= 1;
        }
    }
    __device__ __forceinline__ void begin() { slot = 0, parity = 0; }
    // Wait until this warp's part of the next piece is there for every lane; where it is.
    __device__ __forceinline__ u32 wait() const {
        barrier_wait(full + slot * 8, parity);
        return buffer + slot * PIECE_BYTES + (threadIdx.x >> 5) * STAGE_BYTES;
    }
    // This warp is done with it.
    __device__ __forceinline__ void release() {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(empty + slot * 8);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
#else
    const u8* from;
    int left;

    __device__ __forceinline__ void begin(const u8* first, int count) {
        from = first, left = count, slot = 0;
        for (int i = 0; i < SLOTS; ++i) ask();
    }
    __device__ __forceinline__ u32 place() const { return buffer + slot * PIECE_BYTES + (threadIdx.x >> 5) * STAGE_BYTES; }
    __device__ __forceinline__ void ask() {
        if (left > 0)
            for (int i = (threadIdx.x & 31) * 16; i < STAGE_BYTES; i += 512) copy_async(place() + i, from + i);
        commit_copies();
        --left, from += PIECE_BYTES;
        if (++slot == SLOTS) slot = 0;
    }
    __device__ __forceinline__ u32 wait() const {
        wait_for_copies<SLOTS - 1>();
        __syncwarp();
        return place();
    }
    __device__ __forceinline__ void release() {
        __syncwarp();
        ask();
    }
#endif
};
