// had(x) = norm · (H x) of vectors of b = DENSE · COLUMNS channels (SPEC.md, chapter 9), as float32 or quantized
// (SPEC.md, "Activations").
//
//   x       float32 [V][b]          16-byte aligned; V vectors, `copies` to a token
//   factor  float32 [copies][b] or null   multiplied with x first, one rounding
//   bits    u32 [ROW_PARTS * TILES][K_WORDS][32]   the signs of D, in the order of its fragments: see signs() below
//   norm    f32(1 / sqrt(b))
//   CODES 0: y      float32 [V][b]  not x
//   CODES 1: codes  int8 [V][stride], the first b bytes of a row are written; scale float32 [V]; copies is 1
//
// H_b = D ⊗ Y: D = P_m ⊗ Sylvester(DENSE / m) of any order DENSE, Y = Sylvester(COLUMNS), a power of two. x is a
// matrix X[DENSE][COLUMNS], and H x = D (X Y). PARTS = GROUPS · ROW_PARTS blocks, a cluster where CODES is 1, share a
// vector: each computes one of ROW_PARTS ranges of rows in one of GROUPS ranges of WIDTH columns, and reads all of X.
// X Y: the sum over the GROUPS ranges with the signs of Sylvester(GROUPS), 4 channels a thread, then Sylvester(WIDTH)
// in registers and by shuffles.
// D: by tensor cores. ±1 is exact in bf16, and a float32 is the exact sum of three bf16: the upper, middle and lower 8
// bits of its significand. The upper ones have a sum of their own, nearly exact; where tensor cores truncate the sum of
// the others, that is 2^-8 of the effect. Integers are exact while all sums stay below 2^24.
//
// Limits: COLUMNS, GROUPS powers of two; 8 ≤ WIDTH ≤ 128; NT divides WIDTH / 8; PARTS ≤ 8; clusters from sm_90 on.
// Grid V · PARTS, block THREADS, dynamic shared memory 6 · 16 · K_STEPS · STRIDE bytes.

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
#ifndef CODES
#error "CODES: 0 for float32 output, 1 for codes and scales"
#endif
#include "hadamard.cuh"

constexpr int WIDTH = COLUMNS / GROUPS;
constexpr int PARTS = GROUPS * ROW_PARTS;
constexpr int K_STEPS = (DENSE + 15) / 16;
constexpr int K_WORDS = (K_STEPS + 3) / 4;
constexpr bool SIGNS_HELD = K_WORDS * MT <= 12;  // in registers; else they are read when needed
constexpr int TILES = ((K_STEPS + ROW_PARTS - 1) / ROW_PARTS + MT - 1) / MT * MT;
constexpr int COLUMN_SPANS = WIDTH / (8 * NT);
constexpr int THREADS = TILES / MT * COLUMN_SPANS * 32;
constexpr int STRIDE = WIDTH == 8 ? 8 : WIDTH + 8;  // an odd number of 16-byte units: ldmatrix without bank conflicts
constexpr int CHAINS = MT * NT >= 4 ? 2 : 3;        // accumulators: upper terms | others, or one each
constexpr int REGISTERS = 4 * MT * NT * CHAINS > 32 ? 4 * MT * NT * CHAINS + 48 : 80;  // enough without spills
static_assert(WIDTH >= 8 && WIDTH <= 128 && WIDTH % (8 * NT) == 0 && PARTS <= 8, "limits");
#if defined(__CUDA_ARCH__) && !RCP_HOPPER
static_assert(PARTS == 1 || !CODES, "to quantize, the blocks of a vector are a cluster, which needs sm_90");
#endif

// Where 4 channels of range g begin; `quad` counts them row by row, and rows past the last repeat it.
__device__ __forceinline__ int input_channel(int quad, int g) {
    constexpr int QUADS = WIDTH / 4;
    return min(quad / QUADS, DENSE - 1) * COLUMNS + g * WIDTH + quad % QUADS * 4;
}

// X Y of this block's columns, split into three bf16 terms [3][16 · K_STEPS][STRIDE]; rows from DENSE on are zero.
__device__ __forceinline__ void sylvester(const float* x, const float* factor, int group, u16* terms) {
    constexpr int QUADS = WIDTH / 4, COUNT = 16 * K_STEPS * QUADS, TERM = 16 * K_STEPS * STRIDE;
    constexpr int ROUNDS = (COUNT + THREADS - 1) / THREADS;
    constexpr int BATCH = ROUNDS * GROUPS <= 8 ? ROUNDS : 8 / GROUPS;  // loads are in flight together
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round += BATCH) {
        const int first = round * THREADS + threadIdx.x;
        float4 u[BATCH][GROUPS];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) u[i][g] = *(const float4*)(x + input_channel(first + i * THREADS, g));
        if (factor) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    const float4 f = *(const float4*)(factor + input_channel(first + i * THREADS, g));
                    u[i][g] = {u[i][g].x * f.x, u[i][g].y * f.y, u[i][g].z * f.z, u[i][g].w * f.w};
                }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int row = (first + i * THREADS) / QUADS, column = (first + i * THREADS) % QUADS * 4;
            float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                const float sign = __popc(group & g) & 1 ? -1.0f : 1.0f;
                v[0] = fmaf(sign, u[i][g].x, v[0]);
                v[1] = fmaf(sign, u[i][g].y, v[1]);
                v[2] = fmaf(sign, u[i][g].z, v[2]);
                v[3] = fmaf(sign, u[i][g].w, v[3]);
            }
            sylvester_of_row<WIDTH>(v);
            if (COUNT % (BATCH * THREADS) && row >= 16 * K_STEPS) continue;
            if (row >= DENSE) v[0] = v[1] = v[2] = v[3] = 0.0f;
            store_terms<TERM>(terms + row * STRIDE, column, v);
        }
    }
}

// The largest of the peaks of a cluster's blocks. Each writes its own into the shared memory of all, where a barrier
// counts the bytes: who has all of them may end.
struct Exchange {
    u32 peaks[PARTS];
    u64 barrier;
};
// By all threads, early in the kernel; __syncthreads before exchange_max.
__device__ __forceinline__ void exchange_begin(Exchange& e) {
#if RCP_HOPPER
    if (threadIdx.x == 0) {
        const u32 barrier = shared_address(&e.barrier);
        barrier_init(barrier);
        barrier_init_done();
        barrier_expect<4 * PARTS>(barrier);
    }
    __syncwarp();
    cluster_arrive();
#endif
}
__device__ __forceinline__ u32 exchange_max(u32 peak, int part, Exchange& e) {
#if RCP_HOPPER
    cluster_wait();  // all blocks have begun
    const u32 own = shared_address(e.peaks + part), barrier = shared_address(&e.barrier);
    if (threadIdx.x < PARTS) store_to_block(threadIdx.x, own, barrier, peak);
    barrier_wait(barrier, 0);
    for (int i = 0; i < PARTS; ++i) peak = max(peak, e.peaks[i]);
#endif
    return peak;
}

extern "C" __global__ void __launch_bounds__(THREADS, 65536 / (THREADS * REGISTERS))
hadamard(const float* x, const float* factor, const u32* __restrict__ bits, float norm, int copies, float* y, i8* codes,
         float* scale, int stride, float clip, int code_bits) {
    extern __shared__ __align__(16) u16 terms[];
    constexpr int TERM_BYTES = 16 * K_STEPS * STRIDE * 2;
    pdl_launch();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = blockIdx.x % PARTS, group = part % GROUPS;
    const i64 vector = blockIdx.x / PARTS;
    const int tile = part / GROUPS * TILES + warp / COLUMN_SPANS * MT, span = warp % COLUMN_SPANS * 8 * NT;

    u32 held[MT][SIGNS_HELD ? K_WORDS : 1];
    const u32* const tile_bits = bits + tile * K_WORDS * 32 + lane;
    if constexpr (SIGNS_HELD)
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int k_word = 0; k_word < K_WORDS; ++k_word) held[i][k_word] = tile_bits[(i * K_WORDS + k_word) * 32];
#if CODES
    __shared__ Exchange exchange;
    if constexpr (PARTS > 1) exchange_begin(exchange);
#endif
    pdl_wait();
    if (factor) factor += vector % copies * (DENSE * COLUMNS);
    sylvester(x + vector * (DENSE * COLUMNS), factor, group, terms);
    __syncthreads();

    float sums[CHAINS][MT][NT][4] = {};
    const u32 own = shared_address(terms + lane % 16 * STRIDE + (NT > 1 ? lane / 16 * 8 : 0) + span);
#pragma unroll SIGNS_HELD ? K_WORDS : 1
    for (int k_word = 0; k_word < K_WORDS; ++k_word) {
        u32 word[MT];
#pragma unroll
        for (int i = 0; i < MT; ++i)
            word[i] = SIGNS_HELD ? held[i][k_word % (SIGNS_HELD ? K_WORDS : 1)] : tile_bits[(i * K_WORDS + k_word) * 32];
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            if (4 * k_word + step >= K_STEPS) continue;
            u32 a[MT][4];
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) a[i][j] = signs(word[i], step, j);
#pragma unroll
            for (int term = 0; term < 3; ++term) {
                u32 b[2 * NT];
                load_tiles(b, own + (4 * k_word + step) * 16 * STRIDE * 2 + term * TERM_BYTES);
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int t = 0; t < NT; ++t)
                        mma_bf16(sums[term < CHAINS ? term : CHAINS - 1][i][t], a[i][0], a[i][1], a[i][2], a[i][3], b[2 * t],
                                 b[2 * t + 1]);
            }
        }
    }

    // Lane: rows 16·tile + lane / 4 (+ 8), channels from `channel` on.
    const int channel = group * WIDTH + span + lane % 4 * (2 * NT);
    float out[MT][2][2 * NT];
    u32 peak = 0;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < 2 * NT; ++j) {
                float rest = sums[1][i][j / 2][2 * h + j % 2];
                if constexpr (CHAINS == 3) rest += sums[2][i][j / 2][2 * h + j % 2];
                out[i][h][j] = norm * (sums[0][i][j / 2][2 * h + j % 2] + rest);
                if ((tile + i) * 16 + h * 8 + lane / 4 < DENSE) peak = max(peak, magnitude(out[i][h][j]));
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
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = (tile + i) * 16 + h * 8 + lane / 4;
            if (row >= DENSE) continue;
#if CODES
            i8* const to = codes + vector * stride + row * COLUMNS + channel;
            if constexpr (NT == 1) *(u16*)to = (u16)coder.two(out[i][h]);
            if constexpr (NT == 2) *(u32*)to = coder.four(out[i][h]);
            if constexpr (NT == 4) *(uint2*)to = {coder.four(out[i][h]), coder.four(out[i][h] + 2 * NT - 4)};
#else
            float* const to = y + vector * (DENSE * COLUMNS) + row * COLUMNS + channel;
#pragma unroll
            for (int t = 0; t < NT; ++t) *(float2*)(to + 2 * t) = {out[i][h][2 * t], out[i][h][2 * t + 1]};
#endif
        }
}
