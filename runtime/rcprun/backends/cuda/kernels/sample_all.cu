// The next token of each row of logits, by any options: see sample.cuh for the parameters, and sample.cu, which is faster.
//
// Grid (ceil(V / RCP_CHUNK), M), block 1,024, for each of three kernels in a row: sample_top, which is all that greedy
// rows (temperature 0) need; sample_histogram and sample_draw, which pass over greedy rows. sample_histogram adds masses
// up by bins of top - l, sample_draw gathers the tokens by bin, down to the bin with the k-th, and its last block searches
// in three bins.
#include "sample.cuh"

#ifndef RCP_CHUNK
#error "RCP_CHUNK: logits of a block"
#endif

constexpr int THREADS = 1024;
constexpr int PER_THREAD = RCP_CHUNK / THREADS;
constexpr int BIN_SHIFT = 23 - 9;  // 512 bins for top - l in [0, 1), then for [1, 3), [3, 7), …; the last holds the rest
static_assert(RCP_CHUNK % THREADS == 0 && THREADS % 32 == 0 && BINS % THREADS == 0);

__device__ __forceinline__ u64 warp_max(u64 x) {
    for (int offset = 16; offset; offset >>= 1) {
        const u64 other = __shfl_xor_sync(FULL_MASK, x, offset);
        x = other > x ? other : x;
    }
    return x;
}
__device__ __forceinline__ u64 warp_sum(u64 x) {
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

// The id of this thread's i-th logit in its block's chunk.
__device__ __forceinline__ i32 chunk_id(int i) {
    return (i32)(blockIdx.x * RCP_CHUNK + i * THREADS + threadIdx.x);
}

// This thread's penalized logits; -infinity from V on. True for all threads if one of the chunk is not finite before
// its penalty.
__device__ __forceinline__ bool load_chunk(float (&x)[PER_THREAD], const Row& row, const Arguments& a) {
    __shared__ u32 seen[RCP_CHUNK / 32];
    const i32 first = blockIdx.x * RCP_CHUNK;
    bool unfit = false;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const i32 id = chunk_id(i);
        x[i] = id < row.V ? row.logits[id] : __int_as_float(0xff800000);
        unfit |= id < row.V && !finite(x[i]);
    }
    if (row.penalty != 1.0f) {
        if (threadIdx.x < RCP_CHUNK / 32) seen[threadIdx.x] = 0;
        __syncthreads();
        const i32 length = a.length[blockIdx.y];
        if ((i32)threadIdx.x < min(RECENT, length)) {
            const i32 place = a.history[(i64)blockIdx.y * a.ring + (length - 1 - (i32)threadIdx.x) % a.ring] - first;
            if (place >= 0 && place < RCP_CHUNK) atomicOr(&seen[place / 32], 1u << (place % 32));
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int place = threadIdx.x + i * THREADS;
            if (seen[place / 32] >> (place % 32) & 1)
                x[i] = x[i] > 0.0f ? __fdiv_rn(x[i], row.penalty) : __fmul_rn(x[i], row.penalty);
        }
    }
    return __syncthreads_or(unfit);
}

// For one thread: makes the choice known, and the row ready for the next launch.
__device__ __forceinline__ void choose(const Arguments& a, const Row& row, i32 token) {
    row.field[TOP] = 0;
    State(a).choose(a, token);
}

// Rows for which all is done in sample_top: greedy ones, and those whose top is not finite, as that of UNFIT is not,
// and not that of the 0 which `choose` leaves there.
__device__ __forceinline__ bool decided(const Row& row, u64 top) {
    return row.temperature == 0.0f || !finite(logit_of(top));
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_top(PARAMETERS) {
    pdl_launch();
    pdl_wait();
    const Arguments a = ARGUMENTS;
    const Row row(a);
    float x[PER_THREAD];
    u64 top = load_chunk(x, row, a) ? UNFIT : 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const i32 id = chunk_id(i);
        const u64 key = id < row.V ? sort_key(x[i], id) : 0;
        top = key > top ? key : top;
    }
    __shared__ u64 top_of[THREADS / 32];
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) top_of[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x < 32) {
        top = warp_max(top_of[threadIdx.x]);
        if (threadIdx.x == 0) atomicMax(&row.field[TOP], top);
    }
    if (!last_block(row) || threadIdx.x != 0) return;
    top = atomicMax(&row.field[TOP], 0ull);
    if (decided(row, top)) choose(a, row, finite(logit_of(top)) ? id_of(top) : -1);
}

struct Token : Masses {
    int bin;

    __device__ __forceinline__ Token(float logit, float top, const Row& row) : Masses(logit, top, row) {
        const u32 place = (__float_as_uint(1.0f + (top - logit)) - 0x3f800000u) >> BIN_SHIFT;
        bin = place < BINS ? place : BINS - 1;
    }
};

// The inclusive sum of each mass over the threads up to this one.
__device__ __forceinline__ void block_scan(u64 (&x)[MASSES]) {
    __shared__ u64 of_warp[MASSES][THREADS / 32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < MASSES; ++m) {
        for (int offset = 1; offset < 32; offset *= 2) {
            const u64 other = __shfl_up_sync(FULL_MASK, x[m], offset);
            if (lane >= offset) x[m] += other;
        }
        if (lane == 31) of_warp[m][warp] = x[m];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MASSES; ++m) x[m] += warp_sum(lane < warp ? of_warp[m][lane] : 0);
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_histogram(PARAMETERS) {
    pdl_launch();
    pdl_wait();
    const Arguments a = ARGUMENTS;
    const Row row(a);
    const u64 top_key = row.field[TOP];
    if (decided(row, top_key)) return;
    const float top = logit_of(top_key);
    float x[PER_THREAD];
    load_chunk(x, row, a);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        if (chunk_id(i) >= row.V) continue;
        const Token token(x[i], top, row);
        atomicAdd(row.before(COUNT) + token.bin, 1ull);
        if (token.weight) atomicAdd(row.before(WEIGHT) + token.bin, token.weight);
        if (token.tempered) atomicAdd(row.before(TEMPERED) + token.bin, token.tempered);
    }
    if (!last_block(row)) return;
    constexpr int SHARE = BINS / THREADS;
    const int first = threadIdx.x * SHARE;
    u64 mass[MASSES][SHARE], before[MASSES];
#pragma unroll
    for (int m = 0; m < MASSES; ++m) {
        before[m] = 0;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            mass[m][i] = row.before(m)[first + i];
            before[m] += mass[m][i];
        }
    }
    block_scan(before);
#pragma unroll
    for (int m = 0; m < MASSES; ++m) {
        if (threadIdx.x == THREADS - 1) row.before(m)[BINS] = before[m];
#pragma unroll
        for (int i = SHARE - 1; i >= 0; --i) {
            const u64 through = before[m];
            before[m] -= mass[m][i];
            row.before(m)[first + i] = before[m];
            if (m != COUNT) continue;
            row.field[CURSOR + first + i] = before[m];
            const u64 k = row.top_k > 0 ? min(row.top_k, row.V) : row.V;
            if (before[m] < k && k <= through) row.field[LAST_BIN] = first + i;
        }
    }
}

// The last token whose predecessors' mass is below a target.
struct Boundary {
    u64 key;
    u64 weight, tempered;  // of this token and all before it
};

// target: from 1 to the mass of the tokens gathered. The same in every thread of the block.
__device__ __noinline__ Boundary boundary(const Row& row, int mass, u64 target) {
    constexpr int CAPACITY = THREADS;
    __shared__ u64 near_key[CAPACITY], near_mass[CAPACITY];
    __shared__ i32 found, passes[2][32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u64* const before = row.before(mass);
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += THREADS)
        if (before[b] < target && target <= before[b + 1]) found = b;
    __syncthreads();
    const int bin = found;
    const u64 begin = row.before(COUNT)[bin];
    const i32 n = (i32)(row.before(COUNT)[bin + 1] - begin);
    const u64 *keys = row.gathered(KEY) + begin, *masses = row.gathered(mass) + begin;
    if (n <= CAPACITY) {
        if ((i32)threadIdx.x < n) {
            near_key[threadIdx.x] = keys[threadIdx.x];
            near_mass[threadIdx.x] = mass == COUNT ? 1 : masses[threadIdx.x];
        }
        __syncthreads();
        keys = near_key, masses = near_mass;
    }
    // The smallest key whose larger ones have less mass than the target: each turn, every warp tries one of 32
    // between `low`, which is too small, and `high`, which is not.
    target -= before[bin];
    u64 low = 0, high = 0;
    for (i32 i = lane; i < n; i += 32) {
        low = ~keys[i] > low ? ~keys[i] : low;
        high = keys[i] > high ? keys[i] : high;
    }
    low = ~warp_max(low) - 1, high = warp_max(high);
    for (int turn = 0; high - low > 1; turn ^= 1) {
        const u64 span = high - low, step = span >> 5 ? span >> 5 : 1;
        const u64 distance = step * (warp + 1), pivot = low + (distance < span ? distance : span);
        u64 larger = 0;
        for (i32 i = lane; i < n; i += 32)
            if (keys[i] > pivot) larger += mass == COUNT && n > CAPACITY ? 1 : masses[i];
        larger = warp_sum(larger);
        if (lane == 0) passes[turn][warp] = larger < target;
        __syncthreads();
        const u64 failed = 32 - __popc(__ballot_sync(FULL_MASK, passes[turn][lane]));
        const u64 up = step * (failed + 1);
        if (failed < 32) high = low + (up < span ? up : span);
        low += step * failed;
    }
    u64 weight = 0, tempered = 0;
    for (i32 i = lane; i < n; i += 32) {
        if (keys[i] < high) continue;
        weight += row.gathered(WEIGHT)[begin + i];
        tempered += row.gathered(TEMPERED)[begin + i];
    }
    return {high, row.before(WEIGHT)[bin] + warp_sum(weight), row.before(TEMPERED)[bin] + warp_sum(tempered)};
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_draw(PARAMETERS) {
    pdl_launch();
    pdl_wait();
    const Arguments a = ARGUMENTS;
    const Row row(a);
    const u64 top_key = row.field[TOP];
    if (decided(row, top_key)) return;
    const float top = logit_of(top_key);
    const int last_bin = (int)row.field[LAST_BIN];
    float x[PER_THREAD];
    load_chunk(x, row, a);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const i32 id = chunk_id(i);
        const Token token(x[i], top, row);
        if (id >= row.V || token.bin > last_bin) continue;
        const u64 place = atomicAdd(&row.field[CURSOR + token.bin], 1ull);
        row.gathered(KEY)[place] = sort_key(x[i], id);
        row.gathered(WEIGHT)[place] = token.weight;
        row.gathered(TEMPERED)[place] = token.tempered;
    }
    if (!last_block(row)) return;
    Boundary kept = {0, row.before(WEIGHT)[BINS], row.before(TEMPERED)[BINS]};
    if (row.top_k > 0 && row.top_k < row.V) kept = boundary(row, COUNT, row.top_k);
    if (row.top_p < 1.0f) {
        const u64 target = (u64)ceil((double)row.top_p * (double)kept.weight);
        kept = boundary(row, WEIGHT, target > 1 ? target : 1);
    }
    const u64 key = boundary(row, TEMPERED, State(a).draw(kept.tempered)).key;
    __syncthreads();
    for (int i = threadIdx.x; i < MASSES * (BINS + 1); i += THREADS) row.field[BEFORE + i] = 0;
    if (threadIdx.x == 0) choose(a, row, id_of(key));
}
