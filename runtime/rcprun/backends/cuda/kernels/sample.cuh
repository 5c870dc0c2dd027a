// What the kernels that choose tokens share: their parameters, the order of tokens, their masses, the random stream, and
// what a choice changes. See sample.cu and sample_all.cu.
//
//   logits     f32  [M][V]              V < 2^20
//   numbers    f32  [M][4]              temperature, top_p, min_p, repeat_penalty
//   top_k      i32  [M]
//   random     u32  [M][4]              seed, then the launches since it was set: 64 bits each, low word first
//   token      i32  [M]                 out: the choice, -1 where logits are not finite; the embedding reads it
//   position   i32  [M]                 += 1: place of `token` in its sequence
//   history    i32  [M][ring]           all tokens so far, token i at i % ring; ring >= RECENT
//   length     i32  [M]                 tokens so far, the prompt's included; += 1
//   workspace  u64  [M][RCP_FIELDS + 3·V]   zeros before the first launch, and left so that any next one may start
//
// Order: tokens are sorted by penalized logit, larger first, then by id, smaller first: by `sort_key`, larger first.
// Each has a weight exp(l - top) and a tempered weight exp((l - top) / temperature), or 0 where min-p drops it. Both are
// integers, in units of 2^-44, so that sums are exact and come out the same in any order.
// All that sampling does is to find the last token whose predecessors' mass is below a target:
//   top-k   mass 1 each, target k
//   top-p   weight, target top_p · (weight of the top k)
//   draw    tempered weight, target 1 + floor(uniform · (tempered weight of those kept)).
#pragma once
#include "common.cuh"

#ifndef RCP_FIELDS
#error "RCP_FIELDS: words of a row's workspace, besides those that grow with V"
#endif

constexpr int RECENT = 64;                 // REPEAT_WINDOW of sampling.py
constexpr double UNIT = 17592186044416.0;  // 2^44
constexpr int MOST_BLOCKS = 8, MOST_LISTED = 256;  // of sample.cu
constexpr int BINS = 4096;                         // of sample_all.cu

enum Mass { COUNT, WEIGHT, TEMPERED, MASSES, KEY = COUNT };  // gathered tokens have a key where each counts 1

// A row's workspace, in 64-bit words.
enum Field {
    TOP,                                           // sample_all.cu: largest sort key; UNFIT if a logit is not finite
    ARRIVED,                                       // blocks that have finished the kernel
    LAST_BIN,                                      // sample_all.cu: bin of the top_k-th token
    LISTS,                                         // [blocks][…] sample.cu before sm_90: what each block found
    CURSOR = LISTS + MOST_BLOCKS * MOST_LISTED,    // sample_all.cu: [BINS] where the next token of each bin goes
    BEFORE = CURSOR + BINS,                        // [MASSES][BINS + 1] masses of each bin, then of all before it
    GATHERED = BEFORE + MASSES * (BINS + 1),       // [MASSES][V] tokens by bin: sort key, weight, tempered weight
};
static_assert(GATHERED == RCP_FIELDS);
constexpr u64 UNFIT = ~0ull;

// Every kernel's parameters, and what hands them on.
#define PARAMETERS                                                                                     \
    const float *logits, const float *numbers, const i32 *top_k, u32 *random, i32 *token, i32 *position, \
        i32 *history, i32 *length, u64 *workspace, i32 V, i32 ring
#define ARGUMENTS \
    Arguments { logits, numbers, top_k, random, token, position, history, length, workspace, V, ring }

struct Arguments {
    const float *logits, *numbers;
    const i32* top_k;
    u32* random;
    i32 *token, *position, *history, *length;
    u64* workspace;
    i32 V, ring;
};

struct Row {
    const float* logits;
    float temperature, top_p, min_p, penalty;
    i32 top_k, V;
    u64* field;

    __device__ __forceinline__ explicit Row(const Arguments& a) {
        const int m = blockIdx.y;
        logits = a.logits + (i64)m * a.V;
        temperature = a.numbers[4 * m], top_p = a.numbers[4 * m + 1];
        min_p = a.numbers[4 * m + 2], penalty = a.numbers[4 * m + 3];
        top_k = a.top_k[m], V = a.V;
        field = a.workspace + (i64)m * (RCP_FIELDS + 3ll * a.V);
    }
    __device__ __forceinline__ u64* before(int mass) const { return field + BEFORE + mass * (BINS + 1); }
    __device__ __forceinline__ u64* gathered(int mass) const { return field + RCP_FIELDS + (i64)mass * V; }
};

__device__ __forceinline__ bool finite(float x) {
    return fabsf(x) <= 3.402823466e38f;
}

__device__ __forceinline__ u64 sort_key(float logit, i32 id) {
    const u32 bits = __float_as_uint(logit + 0.0f);  // -0 is 0
    return (u64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | (u32)~id;
}
__device__ __forceinline__ i32 id_of(u64 key) {
    return (i32)~(u32)key;
}
__device__ __forceinline__ float logit_of(u64 key) {
    const u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// True in the last block of a row that gets here, which then sees what the others wrote. Once in a kernel.
__device__ __forceinline__ bool last_block(const Row& row) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&row.field[ARRIVED], 1ull) == gridDim.x - 1;
        if (last) row.field[ARRIVED] = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

struct Masses {
    u64 weight, tempered;

    __device__ __forceinline__ Masses(float logit, float top, const Row& row) {
        const double relative = (double)logit - (double)top, share = exp(relative);
        weight = __double2ull_rn(share * UNIT);
        tempered = share < row.min_p ? 0 : __double2ull_rn(exp(relative / row.temperature) * UNIT);
    }
};

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the first 64 bits of the block
// with this key and counter.
__device__ __forceinline__ u64 philox(u32 key0, u32 key1, u32 counter0, u32 counter1) {
    u32 c0 = counter0, c1 = counter1, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const u64 product0 = (u64)0xD2511F53u * c0, product1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(product1 >> 32) ^ c1 ^ key0, c1 = (u32)product1;
        c2 = (u32)(product0 >> 32) ^ c3 ^ key1, c3 = (u32)product0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return (u64)c1 << 32 | c0;
}

// What a choice adds to, which only the kernel that chooses writes: read before it is needed.
struct State {
    i32 position, length;
    u32 random[4];

    __device__ __forceinline__ explicit State(const Arguments& a) {
        const int m = blockIdx.y;
        position = a.position[m], length = a.length[m];
#pragma unroll
        for (int i = 0; i < 4; ++i) random[i] = a.random[4 * m + i];
    }
    // 1 to `mass`, evenly.
    __device__ __forceinline__ u64 draw(u64 mass) const {
        return __umul64hi(philox(random[0], random[1], random[2], random[3]), mass) + 1;
    }
    // For one thread: makes the choice known.
    __device__ __forceinline__ void choose(const Arguments& a, i32 token) const {
        const int m = blockIdx.y;
        a.token[m] = token;
        a.position[m] = position + 1;
        a.history[(i64)m * a.ring + length % a.ring] = token;
        a.length[m] = length + 1;
        a.random[4 * m + 2] = random[2] + 1;
        a.random[4 * m + 3] = random[3] + (random[2] == 0xffffffffu);
    }
};
