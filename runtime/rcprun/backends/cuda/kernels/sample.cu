// The next token of each row of logits, chosen as rcprun/sampling.py chooses it, and what the next step needs. The
// parameters are those of sample.cuh.
//
//   sample_greedy   every temperature is 0
//   sample_few      every top_k is from 1 to FEW, or the temperature 0; a row of another one fails (-1)
//
// Grid (ceil(V / CHUNK), M), at most MOST_BLOCKS along x; block THREADS. On sm_90 the blocks of a row are a cluster.
// Dynamic shared memory of sample_few: 4·CHUNK bytes.
//
// Each block finds its k best logits, and a few more; the first one, or before sm_90 the last to finish, finds the k best
// of these. To do so it counts keys by bins of top - l and takes those down to the bin with the k-th; if these are too
// many, bins of that bin. The rest is done with k tokens, by one warp.
#include "sample.cuh"

#ifndef RCP_QUADS
#error "RCP_QUADS: fours of adjacent logits that a thread has"
#endif

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int CHUNK = THREADS * 4 * RCP_QUADS;
constexpr int FEW = MOST_LISTED / 2;
constexpr int LARGEST_SHIFT = 23 - 6;  // 64 bins for top - l in [0, 1), then for [1, 3), …; the last of THREADS bins has the rest

// The best of this warp's keys, in every lane.
__device__ __forceinline__ u64 warp_best(u64 key) {
    const u32 high = key >> 32, most = __reduce_max_sync(FULL_MASK, high);
    return (u64)most << 32 | __reduce_max_sync(FULL_MASK, high == most ? (u32)key : 0);
}
// Of all of the block's, in every thread. scratch: not free again before the next __syncthreads.
__device__ __forceinline__ u64 block_best(u64 key, u64* scratch) {
    const int lane = threadIdx.x & 31;
    key = warp_best(key);
    if (lane == 0) scratch[threadIdx.x >> 5] = key;
    __syncthreads();
    return warp_best(lane < WARPS ? scratch[lane] : 0);
}

// This thread's penalized logits: the best of their keys, UNFIT if one was not finite before its penalty. In `orders`,
// where not null, the upper halves of all keys, 0 from V on: memory of the block, though each thread sees its own only.
struct Chunk {
    uint4* orders;
    i32 first;
    u64 best;

    __device__ __forceinline__ Chunk(const Row& row, const Arguments& a, i32 length, uint4* orders) : orders(orders) {
        __shared__ u32 seen[CHUNK / 32];
        const i32 begin = blockIdx.x * CHUNK;
        first = begin + threadIdx.x * 4;
        float x[RCP_QUADS][4];
        u32 magnitude = 0;
#pragma unroll
        for (int q = 0; q < RCP_QUADS; ++q) {
            const i32 id = first + q * THREADS * 4;
            float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (row.V % 4 == 0) {
                if (id < row.V) four = *(const float4*)(row.logits + id);
            } else {
                if (id < row.V) four.x = row.logits[id];
                if (id + 1 < row.V) four.y = row.logits[id + 1];
                if (id + 2 < row.V) four.z = row.logits[id + 2];
                if (id + 3 < row.V) four.w = row.logits[id + 3];
            }
            x[q][0] = four.x, x[q][1] = four.y, x[q][2] = four.z, x[q][3] = four.w;
        }
        if (row.penalty != 1.0f) {
            for (int i = threadIdx.x; i < CHUNK / 32; i += THREADS) seen[i] = 0;
            __syncthreads();
            if ((i32)threadIdx.x < min(RECENT, length)) {
                const i32 at = (length - 1 - (i32)threadIdx.x) % a.ring;
                const i32 place = a.history[(i64)blockIdx.y * a.ring + at] - begin;
                if (place >= 0 && place < CHUNK) atomicOr(&seen[place / 32], 1u << (place % 32));
            }
            __syncthreads();
        }
        best = 0;
#pragma unroll
        for (int q = 0; q < RCP_QUADS; ++q) {
            const int place = threadIdx.x * 4 + q * THREADS * 4;
            const u32 bits = row.penalty != 1.0f ? seen[place / 32] >> (place % 32) : 0;
            u32 order[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float y = x[q][j];
                magnitude = max(magnitude, __float_as_uint(y) & 0x7fffffffu);
                if (bits >> j & 1) y = y > 0.0f ? __fdiv_rn(y, row.penalty) : __fmul_rn(y, row.penalty);
                const u64 key = begin + place + j < row.V ? sort_key(y, begin + place + j) : 0;
                best = key > best ? key : best;
                order[j] = key >> 32;
            }
            if (orders) orders[q * THREADS + threadIdx.x] = make_uint4(order[0], order[1], order[2], order[3]);
        }
        if (magnitude >= 0x7f800000u) best = UNFIT;
    }

    template <class Use>
    __device__ __forceinline__ void each(Use use) const {
#pragma unroll 1
        for (int q = 0; q < RCP_QUADS; ++q) {
            const uint4 four = orders[q * THREADS + threadIdx.x];
            const u32 order[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (order[j]) use((u64)order[j] << 32 | (u32)~(first + q * THREADS * 4 + j));
        }
    }
};

// What the blocks of a row found, this thread's part of it; 0 is no key.
struct Lists {
    const u64* keys;
    int count;

    template <class Use>
    __device__ __forceinline__ void each(Use use) const {
        for (int i = threadIdx.x; i < count; i += THREADS) {
#if RCP_HOPPER
            const u64 key = keys[i];
#else
            const u64 key = __ldcg(keys + i);
#endif
            if (key) use(key);
        }
    }
};

// Number of a key's bin: better keys have smaller ones.
struct Bins {
    float top;  // at first, by the distance from it; then
    u64 high;   // by the distance from this key, in units of 2^shift; better keys are in bin -1
    int shift;

    __device__ __forceinline__ int operator()(u64 key) const {
        if (shift < 0) {
            const u32 place = (__float_as_uint(1.0f + (top - logit_of(key))) - 0x3f800000u) >> LARGEST_SHIFT;
            return place < THREADS ? place : THREADS - 1;
        }
        if (key > high) return -1;
        const u64 place = (high - key) >> shift;
        return place < THREADS ? (int)place : THREADS;
    }
};

struct Selection {
    u64 list[MOST_LISTED];  // what was selected, in any order
    u64 best[2][WARPS];
    u32 count[THREADS], of_warp[WARPS];
    i32 size, bin, before, through;
};

// Puts the k best keys of the block into s.list, and maybe more, up to `capacity` in all; all if there are not k. Returns
// how many. No key is better than one of logit `top`.
template <class Keys>
__device__ __forceinline__ i32 select(const Keys& keys, float top, i32 k, i32 capacity, Selection& s) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Bins bins = {top, 0, -1};
    i32 above = 0;  // keys in bin -1
    for (;;) {
        s.count[threadIdx.x] = 0;
        if (threadIdx.x == 0) s.size = 0, s.bin = THREADS;
        __syncthreads();
        keys.each([&](u64 key) {
            const int bin = bins(key);
            if (bin >= 0 && bin < THREADS) atomicAdd(&s.count[bin], 1u);
        });
        __syncthreads();
        const u32 mine = s.count[threadIdx.x];
        u32 through = mine;
        for (int offset = 1; offset < 32; offset *= 2) {
            const u32 other = __shfl_up_sync(FULL_MASK, through, offset);
            if (lane >= offset) through += other;
        }
        if (lane == 31) s.of_warp[warp] = through;
        __syncthreads();
        through += above + __reduce_add_sync(FULL_MASK, lane < warp ? s.of_warp[lane] : 0);
        if ((i32)(through - mine) < k && k <= (i32)through)
            s.bin = threadIdx.x, s.before = through - mine, s.through = through;
        __syncthreads();
        if (s.bin == THREADS || s.through <= capacity) break;
        above = s.before;
        u64 high = 0, low = 0;
        keys.each([&](u64 key) {
            if (bins(key) != s.bin) return;
            high = key > high ? key : high;
            low = ~key > low ? ~key : low;
        });
        high = block_best(high, s.best[0]), low = ~block_best(low, s.best[1]);
        bins.high = high, bins.shift = 0;
        while ((high - low) >> bins.shift >= THREADS) ++bins.shift;
    }
    keys.each([&](u64 key) {
        if (bins(key) <= s.bin) s.list[atomicAdd(&s.size, 1)] = key;
    });
    __syncthreads();
    return s.size;
}

// Brings `size` keys, the i-th of which is of thread i, to the block that goes on, which is told so. At most once in a
// kernel. In other blocks, nothing is to be done.
template <int MOST>
__device__ __forceinline__ bool bring_together(const Row& row, u64 key, int size, Lists& lists) {
    lists.count = gridDim.x * size;
    const int place = blockIdx.x * size + threadIdx.x;
#if RCP_HOPPER
    __shared__ u64 keys[MOST_BLOCKS * MOST];
    cluster_wait();  // until all of them run
    if ((int)threadIdx.x < size) store_to_block(0, shared_address(keys + place), key);
    __syncwarp();
    cluster_arrive_release();
    lists.keys = keys;
    if (blockIdx.x != 0) return false;
    cluster_wait();
    return true;
#else
    if ((int)threadIdx.x < size) row.field[LISTS + place] = key;
    lists.keys = row.field + LISTS;
    return last_block(row);
#endif
}

__device__ __forceinline__ void start() {
#if RCP_HOPPER
    cluster_arrive();
#endif
    pdl_launch();
    pdl_wait();
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_greedy(PARAMETERS) {
    start();
    const Arguments a = ARGUMENTS;
    const Row row(a);
    const State state(a);
    __shared__ u64 scratch[WARPS];
    const Chunk chunk(row, a, state.length, nullptr);
    const u64 best = block_best(chunk.best, scratch);
    Lists lists;
    if (!bring_together<1>(row, best, 1, lists) || threadIdx.x >= 32) return;
    u64 top = 0;
    lists.each([&](u64 key) { top = key; });  // at most one a lane
    top = warp_best(top);
    if (threadIdx.x == 0) state.choose(a, finite(logit_of(top)) ? id_of(top) : -1);
}

__device__ __forceinline__ u64 warp_scan(u64 x) {
    const int lane = threadIdx.x & 31;
    for (int offset = 1; offset < 32; offset *= 2) {
        const u64 other = __shfl_up_sync(FULL_MASK, x, offset);
        if (lane >= offset) x += other;
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_few(PARAMETERS) {
    start();
    const Arguments a = ARGUMENTS;
    const Row row(a);
    const State state(a);
    const bool greedy = row.temperature == 0.0f;
    const i32 k = greedy ? 1 : row.top_k;
    const bool few = k >= 1 && k <= FEW;
    const i32 capacity = few ? k + max(k, 32) : 1;
    static_assert(FEW >= 32);
    extern __shared__ __align__(16) uint4 orders[];
    __shared__ Selection s;
    __shared__ u64 best_of_warp[2][WARPS];
    const Chunk chunk(row, a, state.length, orders);
    const u64 best = few ? block_best(chunk.best, best_of_warp[0]) : UNFIT;
    u64 mine = threadIdx.x == 0 ? best : 0;
    if (finite(logit_of(best))) {
        const i32 size = select(chunk, logit_of(best), k, capacity, s);
        mine = (i32)threadIdx.x < size ? s.list[threadIdx.x] : 0;
    }
    Lists lists;
    if (!bring_together<MOST_LISTED>(row, mine, capacity, lists)) return;
    u64 top_key = 0;
    lists.each([&](u64 key) { top_key = key > top_key ? key : top_key; });
    top_key = block_best(top_key, best_of_warp[1]);
    const float top = logit_of(top_key);
    if (greedy || !finite(top)) {
        if (threadIdx.x == 0) state.choose(a, finite(top) ? id_of(top_key) : -1);
        return;
    }
    const i32 found = select(lists, top, k, capacity, s), n = min(k, found);
    __shared__ u64 key_of[FEW], weight_of[FEW], tempered_of[FEW];
    if ((i32)threadIdx.x < found) {
        const u64 key = s.list[threadIdx.x];
        i32 rank = 0;
        for (i32 i = 0; i < found; ++i) rank += s.list[i] > key;
        if (rank < n) {
            const Masses masses(logit_of(key), top, row);
            key_of[rank] = key, weight_of[rank] = masses.weight, tempered_of[rank] = masses.tempered;
        }
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const i32 share = (n + 31) / 32, begin = min((i32)threadIdx.x * share, n), end = min(begin + share, n);
    u64 weight = 0, tempered = 0;
    for (i32 i = begin; i < end; ++i) weight += weight_of[i];
    const u64 through = warp_scan(weight);
    const double all = (double)__shfl_sync(FULL_MASK, through, 31);
    const u64 target = row.top_p < 1.0f ? (u64)ceil((double)row.top_p * all) : UNFIT;
    i32 kept = begin;  // of this lane's, those before this one
    for (u64 before = through - weight; kept < end && (kept == 0 || before < target); ++kept) {
        before += weight_of[kept];
        tempered += tempered_of[kept];
    }
    u64 before = warp_scan(tempered);
    const u64 drawn = state.draw(__shfl_sync(FULL_MASK, before, 31));
    before -= tempered;
    for (i32 i = begin; i < kept; ++i) {
        const u64 next = before + tempered_of[i];
        if (before < drawn && drawn <= next) state.choose(a, id_of(key_of[i]));
        before = next;
    }
}
