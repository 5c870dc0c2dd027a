// M tokens of one sequence at positions start, start + 1, ..., causal. q, keys, values, scales and out: attention.cuh.
// window: visible tokens, the query's own among them. scale: log2(e) / sqrt(D).
//
// Grid (G, ceil(M * R / ROWS), PARTS), 32 * BLOCK_WARPS threads. A block takes ROWS = 16 * BLOCK_WARPS of the M * R (token,
// head of the KV head) in that order, the last ones first, a warp 16 of them; of the output's channels it computes one of
// PARTS ranges. It walks over the visible tokens, TILE_TOKENS at a time: while tensor cores work on a tile, the codes of
// the tile after the next come from memory, and those of the next go to shared memory as centred f16 integers, in the
// order of mma's operands.
//
// Scores are products of q, as the sum of two f16 of a common scale, with c'; a token's score gets log2 of its value's step
// added, so that 2^(score - peak) is what c' of the value is multiplied with. It is the sum of two f16 too, hi and lo, which
// add up in one accumulator; so each number has at least 21 bits. peak is such that it stays below 2^16, and follows
// scores only when it must.
//
// Defines: HEAD_DIM, BITS (4 or 8), BLOCK_WARPS, TILE_TOKENS (a multiple of 16, at most 32 * BLOCK_WARPS), PARTS.
#ifndef HEAD_DIM
#error "HEAD_DIM: channels of a head"
#endif
#ifndef BITS
#error "BITS: 4 or 8, of a code"
#endif
#ifndef BLOCK_WARPS
#error "BLOCK_WARPS: of a block, 16 queries each"
#endif
#ifndef TILE_TOKENS
#error "TILE_TOKENS: keys and values of a tile"
#endif
#ifndef PARTS
#error "PARTS: ranges of channels of the output, a block each"
#endif
#include "attention.cuh"

constexpr int THREADS = 32 * BLOCK_WARPS, ROWS = 16 * BLOCK_WARPS;
constexpr int GROUPS = WORDS;                             // of 8 * UNIT channels: 4 words of a key, 8 of a pair of values
constexpr int OUT_GROUPS = (GROUPS + PARTS - 1) / PARTS;  // of a block's output
constexpr bool Q_IN_REGISTERS = PADDED <= 96;  // beside the sums, without which operands come one at a time
constexpr float LARGEST = 15.0f, RESET = 8.0f;  // log2 of the largest weight: allowed, and after peak has moved
constexpr float LOWEST = -1.0e30f;              // of peak: NEVER is far below it
static_assert(TILE_TOKENS % 16 == 0 && TILE_TOKENS <= THREADS);

// N registers of each of 32 lanes (g, j) of a warp. Their order keeps lanes that load or store together in different banks.
template <int N>
struct Slots {
    struct alignas(4 * N) Slot {
        u32 of[N];
    } slot[32];

    static __device__ __forceinline__ int place(int g, int j) { return j * 8 + (g ^ (2 * j) ^ ((j ^ (j >> 1)) & 1)); }
    __device__ __forceinline__ Slot& at(int g, int j) { return slot[place(g, j)]; }
    __device__ __forceinline__ const Slot& at(int g, int j) const { return slot[place(g, j)]; }
};
using KeySlots = Slots<UNIT>;  // codes of a word: the operands b of UNIT / 2 steps
using ValueSlots = Slots<4>;   // codes 2u and 2u + 1 of a word: tokens 2j and 2j + 1, then 2j + 8 and 2j + 9, of each
struct alignas(16) Tile {
    KeySlots keys[TILE_TOKENS / 8][GROUPS];                     // token g, word j of the group
    ValueSlots values[TILE_TOKENS / 16][OUT_GROUPS][UNIT / 2];  // [u]: word g of the group
    float4 score[TILE_TOKENS];   // key's step and mid, log2 of the value's step, -
    float2 weight[TILE_TOKENS];  // 1 / step and mid / step of the value
};
// 16 bytes of codes are words of a group of a key, or of half a group of a pair of values, of which those of tokens 2j and
// 2j + 8 go together. Who copies them expands them.
constexpr int CHUNKS = TILE_TOKENS * GROUPS, OUT_CHUNKS = TILE_TOKENS / 2 * OUT_GROUPS;
constexpr int TURNS = (CHUNKS + THREADS - 1) / THREADS, OUT_TURNS = (OUT_CHUNKS + THREADS - 1) / THREADS;
struct alignas(16) Memory {
    Tile tile[2];
    uint4 codes[TURNS + 2 * OUT_TURNS][THREADS];
    uint4 q[BLOCK_WARPS][STEPS][2][32];  // where it is not in registers: of each step, hi and lo
};

// One KV head's tokens on their way from the cache to a tile.
struct Cache {
    const u32 *keys, *values;
    const uint2* scales;
    int capacity, first, last, part;  // of tokens, those that any of the block's queries sees; of channels
    uint2 scale;                      // of the token that this thread asked for

    __device__ __forceinline__ void request(Memory& memory, int begin) {
#pragma unroll
        for (int n = 0; n < TURNS; ++n) {
            const int chunk = n * THREADS + threadIdx.x, token = min(begin + chunk % TILE_TOKENS, capacity - 1);
            if (CHUNKS % THREADS == 0 || chunk < CHUNKS)
                copy_async(shared_address(&memory.codes[n][threadIdx.x]),
                           keys + (i64)token * ROW_WORDS + chunk / TILE_TOKENS * 4);
        }
#pragma unroll
        for (int n = 0; n < OUT_TURNS; ++n) {
            const int chunk = n * THREADS + threadIdx.x, index = chunk / 8 / (TILE_TOKENS / 16);
            const int pair = begin / 2 + chunk / 8 % (TILE_TOKENS / 16) * 8 + chunk % 4;
            const int group = PARTS == 1 ? index : min(part * OUT_GROUPS + index, GROUPS - 1);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (OUT_CHUNKS % THREADS == 0 || chunk < OUT_CHUNKS)
                    copy_async(shared_address(&memory.codes[TURNS + 2 * n + half][threadIdx.x]),
                               values + (i64)min(pair + 4 * half, capacity / 2 - 1) * (2 * ROW_WORDS) + group * 8 +
                                   chunk / 4 % 2 * 4);
        }
        commit_copies();
        if (threadIdx.x < TILE_TOKENS) scale = scales[min(begin + (int)threadIdx.x, capacity - 1)];
    }

    // What was requested last, to a tile that no one reads.
    __device__ __forceinline__ void expand_tile(const Memory& memory, Tile& tile, int begin) const {
        wait_for_copies<0>();
#pragma unroll
        for (int n = 0; n < TURNS; ++n) {
            const int chunk = n * THREADS + threadIdx.x, token = chunk % TILE_TOKENS;
            if (CHUNKS % THREADS == 0 || chunk < CHUNKS) {
                const uint4 words = memory.codes[n][threadIdx.x];
                KeySlots& slots = tile.keys[token / 8][chunk / TILE_TOKENS];
                expand(slots.at(token % 8, 0), words.x);
                expand(slots.at(token % 8, 1), words.y);
                expand(slots.at(token % 8, 2), words.z);
                expand(slots.at(token % 8, 3), words.w);
            }
        }
#pragma unroll
        for (int n = 0; n < OUT_TURNS; ++n) {
            const int chunk = n * THREADS + threadIdx.x, index = chunk / 8 / (TILE_TOKENS / 16);
            if (OUT_CHUNKS % THREADS == 0 || chunk < OUT_CHUNKS) {
                const uint4 low = memory.codes[TURNS + 2 * n][threadIdx.x], high = memory.codes[TURNS + 2 * n + 1][threadIdx.x];
                ValueSlots(&slots)[UNIT / 2] = tile.values[chunk / 8 % (TILE_TOKENS / 16)][index];
                const int g = chunk / 4 % 2 * 4, j = chunk % 4;
                expand(slots, g, j, low.x, high.x);
                expand(slots, g + 1, j, low.y, high.y);
                expand(slots, g + 2, j, low.z, high.z);
                expand(slots, g + 3, j, low.w, high.w);
            }
        }
        if (threadIdx.x < TILE_TOKENS) {
            const int token = begin + threadIdx.x;
            const bool written = first <= token && token <= last;
            const Scale key = scale_of(written ? scale.x : 0), value = scale_of(written ? scale.y : 0);
            const float inverse = written ? __fdiv_rn(1.0f, value.step) : 0.0f;
            tile.score[threadIdx.x] = {key.step, key.mid, written ? log2f(value.step) : 0.0f, 0.0f};
            tile.weight[threadIdx.x] = {inverse, value.mid * inverse};
        }
    }

  private:
    static __device__ __forceinline__ void expand(KeySlots::Slot& to, u32 word) {
        KeySlots::Slot slot;
#pragma unroll
        for (int s = 0; s < UNIT; ++s) slot.of[s] = centred(word, s);
        to = slot;
    }
    static __device__ __forceinline__ void expand(ValueSlots (&to)[UNIT / 2], int g, int j, u32 low, u32 high) {
#pragma unroll
        for (int u = 0; u < UNIT; u += 2)
            to[u / 2].at(g, j) = {centred(low, u), centred(high, u), centred(low, u + 1), centred(high, u + 1)};
    }
};

// Two floats as the f16 pairs hi and lo, below 2^16 in magnitude: hi is truncated, lo the rest.
__device__ __forceinline__ void split_pair(float x, float y, u32& hi, u32& lo) {
    const float x_hi = __uint_as_float(__float_as_uint(x) & 0xffffe000u);
    const float y_hi = __uint_as_float(__float_as_uint(y) & 0xffffe000u);
    hi = half_pair(x_hi, y_hi);
    lo = half_pair(x - x_hi, y - y_hi);
}

// 16 queries of a warp. Lane (g, j) has what belongs to rows g and g + 8, of every 8 tokens 2j and 2j + 1.
struct Queries {
    u32 q[Q_IN_REGISTERS ? STEPS : 1][2][4];
    float factor[2], sum[2];  // score = step * dot * factor + mid * sum, in powers of two
    float peak[2], total[2], mid[2];  // total, mid: of this lane's tokens, weights and weights times mid
    int position[2];                  // -1: no such query
    float acc[OUT_GROUPS][UNIT][4];   // weights times step times c': of word 8 * group + 2j (+ 1), code u

    // row: the D floats of rows g and g + 8, or null.
    __device__ __forceinline__ void start(const float* const (&row)[2], float scale, uint4 (&shared)[STEPS][2][32]) {
        const int lane = threadIdx.x & 31, j = lane & 3;
        u32 both[STEPS][2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float x[GROUPS][2 * UNIT], peak_q = 0.0f, sum_q = 0.0f;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i)
#pragma unroll
                for (int c = 0; c < 2 * UNIT; c += 2) {  // D is even
                    const int channel = (i * 4 + j) * 2 * UNIT + c;
                    const float2 v = row[r] && channel < HEAD_DIM ? *(const float2*)(row[r] + channel) : float2{};
                    x[i][c] = v.x, x[i][c + 1] = v.y;
                    peak_q = fmaxf(peak_q, fmaxf(fabsf(v.x), fabsf(v.y)));
                    sum_q += v.x + v.y;
                }
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                peak_q = fmaxf(peak_q, __shfl_xor_sync(FULL_MASK, peak_q, lanes));
                sum_q += __shfl_xor_sync(FULL_MASK, sum_q, lanes);
            }
            // 2^(e - 127) <= peak < 2^(e - 126): times 2^(141 - e) it is below 2^15.
            const int exponent = max(__float_as_int(peak_q) >> 23, 30);
            const float up = __int_as_float((268 - exponent) << 23), down = __int_as_float((exponent - 14) << 23);
            factor[r] = down * scale;
            sum[r] = sum_q * scale;
            peak[r] = LOWEST;
            total[r] = mid[r] = 0.0f;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i)
#pragma unroll
                for (int s = 0; s < UNIT; ++s) {
                    u32(&of)[2][4] = both[i * (UNIT / 2) + s / 2];
                    split_pair(x[i][s] * up, x[i][s + UNIT] * up, of[0][s % 2 * 2 + r], of[1][s % 2 * 2 + r]);
                }
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int hi_lo = 0; hi_lo < 2; ++hi_lo) {
                const u32(&of)[4] = both[step][hi_lo];
                if constexpr (Q_IN_REGISTERS) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) q[step][hi_lo][k] = of[k];
                } else {
                    shared[step][hi_lo][lane] = make_uint4(of[0], of[1], of[2], of[3]);  // read by this lane only
                }
            }
#pragma unroll
        for (int i = 0; i < OUT_GROUPS; ++i)
#pragma unroll
            for (int u = 0; u < UNIT; ++u)
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[i][u][c] = 0.0f;
    }

    // dot[n]: of tokens 8n + 2j and 2j + 1, rows g and g + 8.
    __device__ __forceinline__ void multiply_keys(
        float (&dot)[TILE_TOKENS / 8][4], const Tile& tile, const uint4 (&shared)[STEPS][2][32]) const {
        constexpr int HALVES = UNIT / 2, BATCH = TILE_TOKENS / 8 < 4 ? TILE_TOKENS / 8 : 4;
        const int lane = threadIdx.x & 31, g = lane >> 2, j = lane & 3;
#pragma unroll
        for (int n = 0; n < TILE_TOKENS / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) dot[n][c] = 0.0f;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
            uint4 own[HALVES][2];
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
#pragma unroll
                for (int hi_lo = 0; hi_lo < 2; ++hi_lo) {
                    if constexpr (Q_IN_REGISTERS) {
                        const u32(&of)[4] = q[i * HALVES + h][hi_lo];
                        own[h][hi_lo] = make_uint4(of[0], of[1], of[2], of[3]);
                    } else {
                        own[h][hi_lo] = shared[i * HALVES + h][hi_lo][lane];
                    }
                }
#pragma unroll
            for (int first = 0; first < TILE_TOKENS / 8; first += BATCH) {
                KeySlots::Slot key[BATCH];
#pragma unroll
                for (int n = 0; n < BATCH; ++n) key[n] = tile.keys[first + n][i].at(g, j);
#pragma unroll
                for (int h = 0; h < HALVES; ++h)
#pragma unroll
                    for (int hi_lo = 0; hi_lo < 2; ++hi_lo) {
                        const uint4& a = own[h][hi_lo];
#pragma unroll
                        for (int n = 0; n < BATCH; ++n)
                            mma(dot[first + n], a.x, a.y, a.z, a.w, key[n].of[2 * h], key[n].of[2 * h + 1]);
                    }
            }
        }
    }

    // Dot products of the tokens from `begin` on to scores; then peak is high enough for their weights.
    __device__ __forceinline__ void score(float (&dot)[TILE_TOKENS / 8][4], const Tile& tile, int begin, bool masked, int window) {
        const int j = threadIdx.x & 3;
        float highest[2] = {NEVER, NEVER};
#pragma unroll
        for (int n = 0; n < TILE_TOKENS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float4 of = tile.score[8 * n + 2 * j + e];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float& x = dot[n][2 * r + e];
                    x = fmaf(x * factor[r], of.x, fmaf(of.y, sum[r], of.z));
                }
            }
        if (masked)
#pragma unroll
            for (int n = 0; n < TILE_TOKENS / 8; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if ((u32)(position[c / 2] - (begin + 8 * n + 2 * j + c % 2)) >= (u32)window) dot[n][c] = NEVER;
#pragma unroll
        for (int n = 0; n < TILE_TOKENS / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) highest[c / 2] = fmaxf(highest[c / 2], dot[n][c]);
        bool higher = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            for (int lanes = 1; lanes < 4; lanes *= 2)
                highest[r] = fmaxf(highest[r], __shfl_xor_sync(FULL_MASK, highest[r], lanes));
            higher |= highest[r] > peak[r] + LARGEST;
        }
        if (!__any_sync(FULL_MASK, higher)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float moved = highest[r] > peak[r] + LARGEST ? highest[r] - RESET : peak[r];
            const float shrink = exp2_approx(peak[r] - moved);
            peak[r] = moved;
            total[r] *= shrink;
            mid[r] *= shrink;
#pragma unroll
            for (int i = 0; i < OUT_GROUPS; ++i)
#pragma unroll
                for (int u = 0; u < UNIT; ++u) acc[i][u][2 * r] *= shrink, acc[i][u][2 * r + 1] *= shrink;
        }
    }

    __device__ __forceinline__ void multiply_values(const float (&score)[TILE_TOKENS / 8][4], const Tile& tile) {
        const int lane = threadIdx.x & 31, g = lane >> 2, j = lane & 3;
#pragma unroll
        for (int k = 0; k < TILE_TOKENS / 16; ++k) {
            u32 a[2][4];  // hi, lo
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int n = 2 * k + half;
                const float4 of = *(const float4*)&tile.weight[8 * n + 2 * j];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float x = exp2_approx(score[n][2 * r] - peak[r]), y = exp2_approx(score[n][2 * r + 1] - peak[r]);
                    total[r] = fmaf(y, of.z, fmaf(x, of.x, total[r]));
                    mid[r] = fmaf(y, of.w, fmaf(x, of.y, mid[r]));
                    split_pair(x, y, a[0][2 * half + r], a[1][2 * half + r]);
                }
            }
            // As many operands at once as keep sums apart that follow on each other.
            constexpr int SLOTS = OUT_GROUPS * UNIT / 2, BATCH = SLOTS % 4 == 0 ? 4 : SLOTS % 2 == 0 ? 2 : 1;
            const u32 from = shared_address(&tile.values[k][0][0].at(g, j));
#pragma unroll
            for (int first = 0; first < SLOTS; first += BATCH) {
                uint4 value[BATCH];
#pragma unroll
                for (int s = 0; s < BATCH; ++s) value[s] = load4(from + (first + s) * (u32)sizeof(ValueSlots));
#pragma unroll
                for (int hi_lo = 0; hi_lo < 2; ++hi_lo) {
                    const u32(&w)[4] = a[hi_lo];
#pragma unroll
                    for (int s = 0; s < BATCH; ++s) {
                        float(&sums)[UNIT][4] = acc[(first + s) / (UNIT / 2)];
                        const int u = (first + s) % (UNIT / 2) * 2;
                        mma(sums[u], w[0], w[1], w[2], w[3], value[s].x, value[s].y);
                        mma(sums[u + 1], w[0], w[1], w[2], w[3], value[s].z, value[s].w);
                    }
                }
            }
        }
    }

    // to(0), to(1): where the D floats of rows g and g + 8 go, or null.
    template <class Place>
    __device__ __forceinline__ void finish(Place to, int part) {
        const int j = threadIdx.x & 3;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                total[r] += __shfl_xor_sync(FULL_MASK, total[r], lanes);
                mid[r] += __shfl_xor_sync(FULL_MASK, mid[r], lanes);
            }
            const float inverse = __fdiv_rn(1.0f, total[r]);
            float* const row = to(r);
            if (!row) continue;
#pragma unroll
            for (int i = 0; i < OUT_GROUPS; ++i)
#pragma unroll
                for (int c = 0; c < 2 * UNIT; c += 2) {
                    const int channel = ((part * OUT_GROUPS + i) * 8 + 2 * j) * UNIT + c;
                    const float x = acc[i][c % UNIT][2 * r + c / UNIT], y = acc[i][c % UNIT + 1][2 * r + c / UNIT];
                    if (channel < HEAD_DIM)
                        *(float2*)(row + channel) = {(x + mid[r]) * inverse, (y + mid[r]) * inverse};
                }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, PADDED <= 64 ? 3 : PADDED <= 128 ? 2 : 1)
    prefill_attention(const float* q, const u32* keys, const u32* values, const uint2* scales, float* out, int tokens,
                      int start, int slot, int heads, int kv_heads, int capacity, int window, float scale) {
    extern __shared__ __align__(128) u8 dynamic_memory[];
    pdl_launch();
    pdl_wait();
    Memory& memory = *reinterpret_cast<Memory*>(dynamic_memory);
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2;
    const int group = heads / kv_heads, rows = tokens * group, kv_head = blockIdx.x;
    const int block_row = (gridDim.y - 1 - blockIdx.y) * ROWS, warp_row = block_row + warp * 16;

    auto row_of = [&](int r) { return warp_row + g + 8 * r; };
    auto channels = [&](int r) {  // where the D floats of the row begin, in q and out
        return ((i64)(row_of(r) / group) * heads + kv_head * group + row_of(r) % group) * HEAD_DIM;
    };

    Queries queries;
    const float* from[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        from[r] = row_of(r) < rows ? q + channels(r) : nullptr;
        queries.position[r] = row_of(r) < rows ? start + row_of(r) / group : -1;
    }
    auto& shared_q = memory.q[Q_IN_REGISTERS ? 0 : warp];
    queries.start(from, scale, shared_q);

    const int lowest = start + warp_row / group, highest = start + (min(warp_row + 16, rows) - 1) / group;
    const i64 vectors = ((i64)slot * kv_heads + kv_head) * capacity;
    Cache cache = {keys + vectors * ROW_WORDS, values + vectors * ROW_WORDS, scales + vectors, capacity};
    cache.first = max(0, start + block_row / group - window + 1);
    cache.last = start + (min(block_row + ROWS, rows) - 1) / group;
    cache.part = blockIdx.z;
    int begin = cache.first / TILE_TOKENS * TILE_TOKENS, current = 0;
    cache.request(memory, begin);
    cache.expand_tile(memory, memory.tile[0], begin);
    if (begin + TILE_TOKENS <= cache.last) cache.request(memory, begin + TILE_TOKENS);
    __syncthreads();
#pragma unroll 1
    for (; begin <= cache.last; begin += TILE_TOKENS, current ^= 1) {
        const Tile& tile = memory.tile[current];
        const bool works = warp_row < rows && begin <= highest;
        float dot[TILE_TOKENS / 8][4];
        if (works) queries.multiply_keys(dot, tile, shared_q);
        if (begin + TILE_TOKENS <= cache.last) {
            cache.expand_tile(memory, memory.tile[current ^ 1], begin + TILE_TOKENS);
            if (begin + 2 * TILE_TOKENS <= cache.last) cache.request(memory, begin + 2 * TILE_TOKENS);
        }
        if (works) {
            const bool masked = begin + TILE_TOKENS - 1 > lowest || highest - begin >= window;
            queries.score(dot, tile, begin, masked, window);
            queries.multiply_values(dot, tile);
        }
        __syncthreads();
    }
    queries.finish([&](int r) { return row_of(r) < rows ? out + channels(r) : nullptr; }, blockIdx.z);
}
