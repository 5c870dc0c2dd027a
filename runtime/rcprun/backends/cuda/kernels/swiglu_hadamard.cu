// From the integer sums of gate and up to codes and scales of had(SwiGLU), of many tokens: as rescale.cu and then
// hadamard.cu do it, of which this is the form for vectors that one block transforms by itself.
//
//   sum_MR   i32 [m][rows]     rows of gate and up in turn, eight at a time
//   scale_R  f32 [rows];  bias_R  f32 [rows] or null
//   bits, norm, code_bits      as in hadamard.cu
//   codes    i8 [m][stride]    the first DENSE * COLUMNS bytes of a row are written
//   scale    f32 [m]           of the sums' input; then of the codes
//
// While tensor cores work on one vector, the other block of a multiprocessor reads the sums of the next. A warp computes
// MT tiles of rows in one span of 8 NT columns after the other, PASSES in all, and holds its outputs until the token's
// largest magnitude is known.
//
// Grid m, block THREADS, dynamic shared memory 6 * 16 * K_STEPS * STRIDE bytes. Limits: COLUMNS a power of two, 8 to 128.
#ifndef DENSE
#error "DENSE: the order of D"
#endif
#ifndef COLUMNS
#error "COLUMNS: the order of Y"
#endif
#ifndef MT
#error "MT: tiles of 16 rows of a warp"
#endif
#ifndef NT
#error "NT: tiles of 8 columns of a warp: 1, 2 or 4"
#endif
#ifndef PASSES
#error "PASSES: spans of columns of a warp, one after the other"
#endif

#include "hadamard.cuh"
#include "rescale.cuh"

constexpr int K_STEPS = (DENSE + 15) / 16, K_WORDS = (K_STEPS + 3) / 4;
constexpr int TILES = (K_STEPS + MT - 1) / MT * MT;
constexpr int SPANS = COLUMNS / (8 * NT), WARP_SPANS = SPANS / PASSES;
constexpr int THREADS = TILES / MT * WARP_SPANS * 32;
constexpr int STRIDE = COLUMNS == 8 ? 8 : COLUMNS + 8;  // an odd number of 16-byte units: ldmatrix without bank conflicts
constexpr int TERM = 16 * K_STEPS * STRIDE;
constexpr int REGISTERS = 4 * MT * NT * (PASSES + 1) + 40 > 80 ? 4 * MT * NT * (PASSES + 1) + 40 : 80;
static_assert(COLUMNS >= 8 && COLUMNS <= 128 && SPANS % PASSES == 0 && DENSE * COLUMNS % 8 == 0, "limits");

// SwiGLU, times Y, as terms; rows from DENSE on are zero.
__device__ __forceinline__ void sylvester(const int* sum, float x_scale, const float* scale_R, const float* bias_R, u16* terms) {
    constexpr int QUADS = COLUMNS / 4, COUNT = 16 * K_STEPS * QUADS, BATCH = 4;  // loads of a batch are in flight together
    constexpr int BATCHES = (COUNT + BATCH * THREADS - 1) / (BATCH * THREADS);
#pragma unroll 1
    for (int batch = 0; batch < BATCHES; ++batch) {
        const int first = batch * BATCH * THREADS + threadIdx.x;
        int4 gate[BATCH], up[BATCH];
        int from[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            from[i] = gate_row(min(first + i * THREADS, DENSE * QUADS - 1) * 4);
            gate[i] = __ldcs((const int4*)(sum + from[i]));
            up[i] = __ldcs((const int4*)(sum + from[i] + 8));
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int row = (first + i * THREADS) / QUADS, column = (first + i * THREADS) % QUADS * 4;
            const Rows gate_rows(scale_R, bias_R, from[i]), up_rows(scale_R, bias_R, from[i] + 8);
            const float4 z = silu_times(gate_rows(gate[i], x_scale), up_rows(up[i], x_scale));
            float v[4] = {z.x, z.y, z.z, z.w};
            sylvester_of_row<COLUMNS>(v);
            if (COUNT % (BATCH * THREADS) && row >= 16 * K_STEPS) continue;
            if (row >= DENSE) v[0] = v[1] = v[2] = v[3] = 0.0f;
            store_terms<TERM>(terms + row * STRIDE, column, v);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 65536 / (THREADS * REGISTERS))
    swiglu_hadamard(const int* sum_MR, const float* scale_R, const float* bias_R, const u32* __restrict__ bits, float norm,
                    i8* codes, float* scale, int rows, int stride, float clip, int code_bits) {
    extern __shared__ __align__(16) u16 terms[];
    pdl_launch();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int tile = warp / WARP_SPANS * MT;
    const i64 token = blockIdx.x;
    const u32* const tile_bits = bits + tile * K_WORDS * 32 + lane;
    pdl_wait();
    sylvester(sum_MR + token * rows, scale[token], scale_R, bias_R, terms);
    __syncthreads();

    float out[PASSES][MT][2][2 * NT];
    u32 peak = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int span = (pass * WARP_SPANS + warp % WARP_SPANS) * 8 * NT;
        const u32 own = shared_address(terms + lane % 16 * STRIDE + (NT > 1 ? lane / 16 * 8 : 0) + span);
        float sums[2][MT][NT][4] = {};  // of upper terms, and of others
        u32 word[MT], next[MT];
#pragma unroll
        for (int i = 0; i < MT; ++i) next[i] = tile_bits[i * K_WORDS * 32];
#pragma unroll 1
        for (int k_word = 0; k_word < K_WORDS; ++k_word) {
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                word[i] = next[i];
                next[i] = tile_bits[(i * K_WORDS + min(k_word + 1, K_WORDS - 1)) * 32];
            }
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                if (K_STEPS % 4 && 4 * k_word + step >= K_STEPS) break;
                u32 a[MT][4];
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) a[i][j] = signs(word[i], step, j);
#pragma unroll
                for (int term = 0; term < 3; ++term) {
                    u32 b[2 * NT];
                    load_tiles(b, own + (4 * k_word + step) * 16 * STRIDE * 2 + term * TERM * 2);
#pragma unroll
                    for (int i = 0; i < MT; ++i)
#pragma unroll
                        for (int t = 0; t < NT; ++t)
                            mma_bf16(sums[term > 0][i][t], a[i][0], a[i][1], a[i][2], a[i][3], b[2 * t], b[2 * t + 1]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int j = 0; j < 2 * NT; ++j) {
                    float& x = out[pass][i][h][j];
                    x = norm * (sums[0][i][j / 2][2 * h + j % 2] + sums[1][i][j / 2][2 * h + j % 2]);
                    if ((tile + i) * 16 + h * 8 + lane / 4 < DENSE) peak = max(peak, magnitude(x));
                }
    }

    __shared__ u32 scratch[32];
    peak = block_peak(peak, scratch);
    const TokenScale of_token = token_scale(__uint_as_float(peak), clip, code_bits);
    if (threadIdx.x == 0) scale[token] = of_token.scale;
    const Coder coder(of_token, code_bits);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = (tile + i) * 16 + h * 8 + lane / 4;
                if (row >= DENSE) continue;
                const int channel = (pass * WARP_SPANS + warp % WARP_SPANS) * 8 * NT + lane % 4 * (2 * NT);
                i8* const to = codes + token * stride + row * COLUMNS + channel;
                const float(&x)[2 * NT] = out[pass][i][h];
                if constexpr (NT == 1) *(u16*)to = (u16)coder.two(x);
                if constexpr (NT == 2) *(u32*)to = coder.four(x);
                if constexpr (NT == 4) *(uint2*)to = {coder.four(x), coder.four(x + 2 * NT - 4)};
            }
}
