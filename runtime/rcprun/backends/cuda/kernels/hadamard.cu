// had(x) = norm · (H x) of vectors of b = DENSE · COLUMNS channels (SPEC.md, chapter 9), as float32 or quantized
// (SPEC.md, "Activations").
//
//   x       float32 [V][b]          16-byte aligned; V vectors, `copies` to a token
//   factor  float32 [copies][b] or null   multiplied with x first, one rounding
//   bits    u32 [ROW_PARTS * TILES][K_WORDS][32]   the signs of D, in the order of its fragments: see signs()
//   norm    f32(1 / sqrt(b))
//   CODES 0: y      float32 [V][b]  not x
//   CODES 1: codes  int8 [V][stride], the first b bytes of a row are written; scale float32 [V]; copies is 1
//
// H_b = D ⊗ Y: D = P_m ⊗ Sylvester(DENSE / m) of any order DENSE, Y = Sylvester(COLUMNS), a power of two. x is a
// matrix X[DENSE][COLUMNS], and H x = D (X Y). PARTS = GROUPS · ROW_PARTS blocks, a cluster where CODES is 1, share a
// vector: each computes one of ROW_PARTS ranges of rows in one of GROUPS ranges of WIDTH columns.
// X Y: the sum over the GROUPS ranges with the signs of Sylvester(GROUPS), 4 channels a thread, then Sylvester(WIDTH)
// in registers and by shuffles. For that each block reads all of X, in pieces as short as WIDTH. With SUM_AFTER it reads
// its own range only, and the sums over ranges come last, of what the blocks of the same rows send each other; where
// there are no clusters, a block computes all ranges.
// D: by tensor cores. ±1 is exact in bf16, and a float32 is the exact sum of three bf16: the upper, middle and lower 8
// bits of its significand. The upper ones have a sum of their own, nearly exact; where tensor cores truncate the sum of
// the others, that is 2^-8 of the effect. Integers are exact while all sums stay below 2^24.
// Blocks that share a vector have few vectors, so that latencies count: K_PARTS warps share the steps along the sums of
// the same tiles, and fragments of D are made before the wait (HELD) where registers allow it.
//
// Limits: COLUMNS, GROUPS powers of two; 8 ≤ WIDTH ≤ 128; NT divides WIDTH / 8, and is 1 with SUM_AFTER; K_PARTS divides
// 2 · MT, GROUPS with SUM_AFTER UNITS; PARTS ≤ 16; clusters from sm_90 on, of more than 8 blocks where the GPU has them.
// Grid V · PARTS, block THREADS, dynamic shared memory SHARED bytes.

#ifndef DENSE
#error "DENSE: the order of D"
#endif
#ifndef COLUMNS
#error "COLUMNS: the order of Y"
#endif
#ifndef GROUPS
#error "GROUPS: ranges of columns, each of other blocks"
#endif
#ifndef ROW_PARTS
#error "ROW_PARTS: ranges of rows, each of other blocks"
#endif
#ifndef MT
#error "MT: tiles of 16 rows of a warp"
#endif
#ifndef NT
#error "NT: tiles of 8 columns of a warp: 1, 2 or 4"
#endif
#ifndef K_PARTS
#error "K_PARTS: warps that share the steps along the sums"
#endif
#ifndef SUM_AFTER
#error "SUM_AFTER: 1 to sum over ranges of columns after D"
#endif
#ifndef HELD
#error "HELD: 1 to make fragments of D before the wait, 0 when they are needed"
#endif
#ifndef REGISTERS
#error "REGISTERS: of a thread, enough not to spill"
#endif
#ifndef CODES
#error "CODES: 0 for float32 output, 1 for codes and scales"
#endif
#include "hadamard.cuh"

#define CLUSTERS (RCP_HOPPER && GROUPS * ROW_PARTS > 1 && (CODES || SUM_AFTER))
constexpr int WIDTH = COLUMNS / GROUPS;
constexpr int BLOCK_GROUPS = SUM_AFTER && !CLUSTERS ? GROUPS : 1;  // ranges of columns of a block
constexpr int GROUP_BLOCKS = GROUPS / BLOCK_GROUPS, PARTS = GROUP_BLOCKS * ROW_PARTS;
constexpr int SUMMED_BEFORE = SUM_AFTER ? 1 : GROUPS;
constexpr int K_STEPS = (DENSE + 15) / 16;
constexpr int K_WORDS = (K_STEPS + 3) / 4;
constexpr int TILES = ((K_STEPS + ROW_PARTS - 1) / ROW_PARTS + MT - 1) / MT * MT;
constexpr int COLUMN_SPANS = WIDTH / (8 * NT);
constexpr int SUM_WARPS = TILES / MT * COLUMN_SPANS;  // whose sums are different ones
constexpr int THREADS = SUM_WARPS * K_PARTS * 32;
// What holds fragments shall start beside a block of linear.cu: bounds for more threads keep it to REGISTERS, about.
constexpr int BOUND = 65536 / REGISTERS / 128 * 128, BOUND_THREADS = HELD && THREADS < BOUND ? BOUND : THREADS;
constexpr int MIN_BLOCKS = 65536 / (BOUND_THREADS * REGISTERS);
constexpr int STEPS = (K_STEPS + K_PARTS - 1) / K_PARTS;  // of a warp: k_part, k_part + K_PARTS, ...
constexpr bool WORDS_HELD = !HELD && K_WORDS * MT <= 12;  // else they are read when needed
constexpr int CHAINS = MT * NT >= 4 ? 2 : 3;              // accumulators: upper terms | others, or one each
// A unit of sums: 8 rows, 8 · NT columns, of which a lane has 2 · NT: row lane / 4, columns from lane % 4 · 2 · NT on.
constexpr int LANE_SUMS = 2 * NT, UNIT = 32 * LANE_SUMS, UNITS = 2 * TILES * COLUMN_SPANS;
constexpr int KEPT = 2 * MT / K_PARTS;       // units of a warp, when K_PARTS warps have added theirs
constexpr int OUTPUTS = KEPT * BLOCK_GROUPS;  // units of outputs of a warp
// Dynamic shared memory: terms, 3 [16 · K_STEPS][STRIDE]; where K_PARTS > 1, sums [K_PARTS][UNITS][UNIT]; with SUM_AFTER,
// gathered sums [UNITS · BLOCK_GROUPS / GROUPS][GROUPS][UNIT].
constexpr int STRIDE = WIDTH == 8 ? 8 : WIDTH + 8;  // an odd number of 16-byte units: ldmatrix without bank conflicts
constexpr int TERM_BYTES = 16 * K_STEPS * STRIDE * 2;
constexpr int SUM_BYTES = K_PARTS > 1 ? K_PARTS * UNITS * UNIT * 4 : 0;
constexpr int GATHERED_BYTES = SUM_AFTER ? UNITS * BLOCK_GROUPS * UNIT * 4 : 0;
constexpr int SHARED = 3 * TERM_BYTES + SUM_BYTES + GATHERED_BYTES;
static_assert(SHARED <= 227 * 1024, "limits");
static_assert(WIDTH >= 8 && WIDTH <= 128 && WIDTH % (8 * NT) == 0 && PARTS <= 16, "limits");
static_assert(K_PARTS == 1 || (HELD && 2 * MT % K_PARTS == 0), "limits");
static_assert(!SUM_AFTER || (NT == 1 && UNITS % GROUPS == 0), "limits");
#if defined(__CUDA_ARCH__) && !RCP_HOPPER
static_assert(PARTS == 1 || !CODES, "to quantize, the blocks of a vector are a cluster, which needs sm_90");
#endif

// Where 4 channels of range g begin; `quad` counts them row by row, and rows past the last repeat it.
__device__ __forceinline__ u32 input_channel(u32 quad, int g) {
    constexpr u32 QUADS = WIDTH / 4;
    return min(quad / QUADS, DENSE - 1u) * COLUMNS + g * WIDTH + quad % QUADS * 4;
}

// X Y of a range of columns, split into three bf16 terms [3][16 · K_STEPS][STRIDE]; rows from DENSE on are zero.
// thread: threadIdx.x, so that after the wait it need not be asked for.
__device__ __forceinline__ void sylvester(const float* x, const float* factor, int group, u32 thread, u16* terms) {
    constexpr u32 QUADS = WIDTH / 4, COUNT = 16 * K_STEPS * QUADS, TERM = 16 * K_STEPS * STRIDE;
    constexpr int ROUNDS = (COUNT + THREADS - 1) / THREADS, MOST_LOADS = HELD ? 16 : 8;
    constexpr int BATCH =
        ROUNDS * SUMMED_BEFORE <= MOST_LOADS ? ROUNDS : MOST_LOADS / SUMMED_BEFORE;  // loads are in flight together
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round += BATCH) {
        const u32 first = round * THREADS + thread;
        const int from = SUM_AFTER ? group : 0;
        float4 u[BATCH][SUMMED_BEFORE];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
#pragma unroll
            for (int g = 0; g < SUMMED_BEFORE; ++g) u[i][g] = *(const float4*)(x + input_channel(first + i * THREADS, from + g));
        if (factor) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
#pragma unroll
                for (int g = 0; g < SUMMED_BEFORE; ++g) {
                    const float4 f = *(const float4*)(factor + input_channel(first + i * THREADS, from + g));
                    u[i][g] = {u[i][g].x * f.x, u[i][g].y * f.y, u[i][g].z * f.z, u[i][g].w * f.w};
                }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const u32 row = (first + i * THREADS) / QUADS, column = (first + i * THREADS) % QUADS * 4;
            float v[4] = {u[i][0].x, u[i][0].y, u[i][0].z, u[i][0].w};
#pragma unroll
            for (int g = 1; g < SUMMED_BEFORE; ++g) {
                const float sign = __popc(group & g) & 1 ? -1.0f : 1.0f;
                v[0] = fmaf(sign, u[i][g].x, v[0]);
                v[1] = fmaf(sign, u[i][g].y, v[1]);
                v[2] = fmaf(sign, u[i][g].z, v[2]);
                v[3] = fmaf(sign, u[i][g].w, v[3]);
            }
            sylvester_of_row<WIDTH>(v);
            const bool may_exceed = COUNT % (BATCH * THREADS) && (BATCH < ROUNDS || i == BATCH - 1);
            if (may_exceed && row >= 16 * K_STEPS) continue;
            if (row >= DENSE) v[0] = v[1] = v[2] = v[3] = 0.0f;
            store_terms<TERM>(terms + row * STRIDE, column, v);
        }
    }
}

// What the blocks of a cluster write into each other's shared memory, where barriers count the bytes: who has all of them
// may end. They are the largest magnitudes of all blocks and, with SUM_AFTER, sums of the blocks of the same rows: those of
// unit u to the block of range u % GROUPS.
struct __align__(16) Exchange {
    u32 peaks[PARTS];
    u64 have_peaks, have_sums;
};
// By all threads; exchange_ready comes before all that follows here, __syncthreads between it and that.
__device__ __forceinline__ void exchange_begin(Exchange& e) {
#if CLUSTERS
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&e.have_peaks));
        barrier_init(shared_address(&e.have_sums));
        barrier_init_done();
        barrier_expect<4 * PARTS>(shared_address(&e.have_peaks));
        barrier_expect<GATHERED_BYTES>(shared_address(&e.have_sums));
    }
    __syncwarp();
    cluster_arrive();
#endif
}
__device__ __forceinline__ void exchange_ready() {
#if CLUSTERS
    cluster_wait();  // all blocks have begun
#endif
}
__device__ __forceinline__ void send_sums(const float (&sums)[LANE_SUMS], int unit, int group, int part, float* gathered, Exchange& e) {
    float* const to = gathered + (unit / GROUP_BLOCKS * GROUPS + group) * UNIT + threadIdx.x % 32 * LANE_SUMS;
#if CLUSTERS
    const int block = part - group + unit % GROUPS;
    store_to_block(block, shared_address(to), shared_address(&e.have_sums), make_float2(sums[0], sums[1]));
#else
    *(float2*)to = {sums[0], sums[1]};
#endif
}
__device__ __forceinline__ void wait_for_sums(Exchange& e) {
#if CLUSTERS
    barrier_wait(shared_address(&e.have_sums), 0);
#else
    __syncthreads();
#endif
}
__device__ __forceinline__ u32 exchange_max(u32 peak, int part, Exchange& e) {
#if CLUSTERS
    const u32 own = shared_address(e.peaks + part), barrier = shared_address(&e.have_peaks);
    if (threadIdx.x < PARTS) store_to_block(threadIdx.x, own, barrier, peak);
    barrier_wait(barrier, 0);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) peak = max(peak, e.peaks[i]);
#endif
    return peak;
}

// Adds the products of a step to a warp's sums. fragment: of D; rows: the address of the step's first row of terms.
__device__ __forceinline__ void multiply(float (&sums)[CHAINS][MT][NT][4], const u32 (&fragment)[MT][4], u32 rows) {
#pragma unroll
    for (int term = 0; term < 3; ++term) {
        u32 b[2 * NT];
        load_tiles(b, rows + term * TERM_BYTES);
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int t = 0; t < NT; ++t)
                mma_bf16(sums[term < CHAINS ? term : CHAINS - 1][i][t], fragment[i][0], fragment[i][1], fragment[i][2],
                         fragment[i][3], b[2 * t], b[2 * t + 1]);
    }
}

// The s-th step of a warp; the last step again where it has none, its fragment then being zero.
__device__ __forceinline__ u32 step_of(int k_part, int s) {
    const u32 step = k_part + s * K_PARTS;
    return K_STEPS % K_PARTS == 0 || s < STEPS - 1 ? step : min(step, K_STEPS - 1u);
}

// Of a warp's `half` tile, of which it has 2 · MT from `tile` on.
__device__ __forceinline__ int unit_of(int tile, int span, int half) { return (2 * tile + half) * COLUMN_SPANS + span; }

// The sums of a warp's unit: half a tile, of MT.
__device__ __forceinline__ void total(const float (&sums)[CHAINS][MT][NT][4], int half, float (&of_unit)[LANE_SUMS]) {
#pragma unroll
    for (int j = 0; j < LANE_SUMS; ++j) {
        const int i = half / 2, c = half % 2 * 2 + j % 2;
        float rest = sums[1][i][j / 2][c];
        if constexpr (CHAINS == 3) rest += sums[2][i][j / 2][c];
        of_unit[j] = sums[0][i][j / 2][c] + rest;
    }
}

extern "C" __global__ void __launch_bounds__(BOUND_THREADS, MIN_BLOCKS)
hadamard(const float* x, const float* factor, const u32* __restrict__ bits, float norm, int copies, float* y, i8* codes,
         float* scale, int stride, float clip, int code_bits) {
    extern __shared__ __align__(16) u16 terms[];
    __shared__ Exchange exchange;
    pdl_launch();
    const u32 thread = kept(threadIdx.x), block = kept(blockIdx.x);
    const int lane = thread & 31, warp = thread >> 5;
    const int part = block % PARTS, own_group = part % GROUP_BLOCKS, row_part = part / GROUP_BLOCKS;
    const u32 vector = block / PARTS;
    const int k_part = warp / SUM_WARPS, sum_warp = warp % SUM_WARPS;
    const int tile = sum_warp / COLUMN_SPANS * MT, span = sum_warp % COLUMN_SPANS;

    const u32* const tile_bits = bits + (row_part * TILES + tile) * K_WORDS * 32 + lane;
    u32 held[HELD ? STEPS : 1][MT][4], words[WORDS_HELD ? K_WORDS : 1][MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
        if constexpr (HELD)
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const u32 step = step_of(k_part, s), word = tile_bits[(i * K_WORDS + step / 4) * 32];
                const bool there = K_STEPS % K_PARTS == 0 || s < STEPS - 1 || k_part + s * K_PARTS < K_STEPS;
#pragma unroll
                for (int j = 0; j < 4; ++j) held[s][i][j] = kept(there ? signs(word, step % 4, j) : 0);
            }
        if constexpr (WORDS_HELD)
#pragma unroll
            for (int k_word = 0; k_word < K_WORDS; ++k_word) words[k_word][i] = tile_bits[(i * K_WORDS + k_word) * 32];
    }
    exchange_begin(exchange);
    x += (i64)vector * (DENSE * COLUMNS);
    if (factor) factor += vector % (u32)copies * (DENSE * COLUMNS);
    exchange_ready();
    pdl_wait_together();

    float* const all_sums = (float*)((char*)terms + 3 * TERM_BYTES);
    float* const gathered = all_sums + SUM_BYTES / 4;
    float out[OUTPUTS][LANE_SUMS];
#pragma unroll 1
    for (int group = own_group; group < own_group + BLOCK_GROUPS; ++group) {
        sylvester(x, factor, group, thread, terms);
        __syncthreads();

        float sums[CHAINS][MT][NT][4] = {};
        const u32 own = shared_address(terms + lane % 16 * STRIDE + (NT > 1 ? lane / 16 * 8 : 0) + span * 8 * NT);
        constexpr int STEP_BYTES = 16 * STRIDE * 2;
        if constexpr (HELD) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) multiply(sums, held[s], own + step_of(k_part, s) * STEP_BYTES);
        } else {
#pragma unroll WORDS_HELD ? K_WORDS : 1
            for (int k_word = 0; k_word < K_WORDS; ++k_word) {
                u32 word[MT];
#pragma unroll
                for (int i = 0; i < MT; ++i)
                    word[i] = WORDS_HELD ? words[k_word % (WORDS_HELD ? K_WORDS : 1)][i] : tile_bits[(i * K_WORDS + k_word) * 32];
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    if (4 * k_word + step >= K_STEPS) continue;
                    u32 fragment[MT][4];
#pragma unroll
                    for (int i = 0; i < MT; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j) fragment[i][j] = signs(word[i], step, j);
                    multiply(sums, fragment, own + (4 * k_word + step) * STEP_BYTES);
                }
            }
        }

        float unit_sums[KEPT][LANE_SUMS];
        if constexpr (K_PARTS == 1) {
#pragma unroll
            for (int u = 0; u < KEPT; ++u) total(sums, u, unit_sums[u]);
        } else {
            float* const warp_sums = all_sums + sum_warp * (2 * MT * UNIT) + lane * 2;
#pragma unroll
            for (int u = 0; u < 2 * MT; ++u) {
                float part_sums[LANE_SUMS];
                total(sums, u, part_sums);
#pragma unroll
                for (int j = 0; j < LANE_SUMS; j += 2)
                    *(float2*)(warp_sums + k_part * (UNITS * UNIT) + u * UNIT + j * 32) = {part_sums[j], part_sums[j + 1]};
            }
            __syncthreads();
#pragma unroll
            for (int u = 0; u < KEPT; ++u)
#pragma unroll
                for (int j = 0; j < LANE_SUMS; j += 2) {
                    unit_sums[u][j] = unit_sums[u][j + 1] = 0.0f;
#pragma unroll
                    for (int p = 0; p < K_PARTS; ++p) {
                        const float* const from = warp_sums + p * (UNITS * UNIT) + (k_part * KEPT + u) * UNIT + j * 32;
                        const float2 more = *(const float2*)from;
                        unit_sums[u][j] += more.x;
                        unit_sums[u][j + 1] += more.y;
                    }
                }
        }
#pragma unroll
        for (int u = 0; u < KEPT; ++u)
            if constexpr (SUM_AFTER)
                send_sums(unit_sums[u], unit_of(tile, span, k_part * KEPT + u), group, part, gathered, exchange);
            else
#pragma unroll
                for (int j = 0; j < LANE_SUMS; ++j) out[u][j] = unit_sums[u][j];
        if constexpr (BLOCK_GROUPS > 1) __syncthreads();
    }

    u32 unit[OUTPUTS], group[OUTPUTS];
    if constexpr (SUM_AFTER) wait_for_sums(exchange);
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        if constexpr (SUM_AFTER) {
            const u32 output = warp * OUTPUTS + o;
            unit[o] = output / GROUPS * GROUP_BLOCKS + own_group;
            group[o] = output % GROUPS;
#pragma unroll
            for (int j = 0; j < LANE_SUMS; ++j) out[o][j] = 0.0f;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                const float sign = __popc(group[o] & g) & 1 ? -1.0f : 1.0f;
                const float2 from = *(const float2*)(gathered + (output / GROUPS * GROUPS + g) * UNIT + lane * LANE_SUMS);
                out[o][0] = fmaf(sign, from.x, out[o][0]);
                out[o][1] = fmaf(sign, from.y, out[o][1]);
            }
        } else {
            unit[o] = unit_of(tile, span, k_part * KEPT + o);
            group[o] = own_group;
        }
    }

    u32 row[OUTPUTS], channel[OUTPUTS];
    u32 peak = 0;
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        row[o] = (row_part * 2 * TILES + unit[o] / COLUMN_SPANS) * 8 + lane / 4;
        channel[o] = group[o] * WIDTH + unit[o] % COLUMN_SPANS * 8 * NT + lane % 4 * LANE_SUMS;
#pragma unroll
        for (int j = 0; j < LANE_SUMS; ++j) {
            out[o][j] *= norm;
            if (row[o] < DENSE) peak = max(peak, magnitude(out[o][j]));
        }
    }

#if CODES
    __shared__ u32 scratch[32];
    peak = block_peak(peak, scratch);
    if constexpr (PARTS > 1) peak = exchange_max(peak, part, exchange);
    const TokenScale token = token_scale(__uint_as_float(peak), clip, code_bits);
    if (part == 0 && threadIdx.x == 0) scale[vector] = token.scale;
    const Coder coder(token, code_bits);
#endif
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        if (row[o] >= DENSE) continue;
#if CODES
        i8* const to = codes + (i64)vector * stride + row[o] * COLUMNS + channel[o];
        if constexpr (NT == 1) *(u16*)to = (u16)coder.two(out[o]);
        if constexpr (NT == 2) *(u32*)to = coder.four(out[o]);
        if constexpr (NT == 4) *(uint2*)to = {coder.four(out[o]), coder.four(out[o] + LANE_SUMS - 4)};
#else
        float* const to = y + (i64)vector * (DENSE * COLUMNS) + row[o] * COLUMNS + channel[o];
#pragma unroll
        for (int t = 0; t < NT; ++t) *(float2*)(to + 2 * t) = {out[o][2 * t], out[o][2 * t + 1]};
#endif
    }
}
