// From the integer sums of gate and up to codes and scales of had(SwiGLU), of many tokens: as rescale.cu and then
// hadamard.cu do it, of which this is the form for vectors that one block transforms by itself.
//
//   sum_MR   i32 [m][rows]     rows of gate and up in turn, eight at a time
//   scale_R  f32 [rows];  bias_R  f32 [rows] or null
//   bits, norm, code_bits      as in hadamard.cu
//   codes    i8 [m][stride]    the first DENSE * COLUMNS bytes of a row are written
//   scale    f32 [m]           of the sums' input; then of the codes
//
// X Y is two f16 terms, 22 bits and more of each float: its largest magnitude is known before, and a power of two brings
// it to [2^14, 2^15), so that what is lost of small floats is nothing beside it.
//
// While tensor cores work on one vector, the other block of a multiprocessor reads the sums of the next. A warp computes
// MT tiles of rows in one span of 8 NT columns after the other, PASSES in all, and holds its outputs until the token's
// largest magnitude is known.
//
// Grid m, block THREADS, dynamic shared memory 4 * 16 * K_STEPS * STRIDE bytes. Limits: COLUMNS a power of two, 8 to 128.
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
#ifndef BIASED
#error "BIASED: whether there is bias_R"
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

// Quads of neighbouring columns: in a row, in all, of a thread (numbers threadIdx.x, + THREADS, …: in the same columns),
// and those whose sums are asked for before they are used.
constexpr int QUADS = COLUMNS / 4, COUNT = 16 * K_STEPS * QUADS, OWN = (COUNT + THREADS - 1) / THREADS, AHEAD = OWN < 4 ? OWN : 4;

// Whether a thread's quad number i is below count; known to the compiler where all threads' are.
__device__ __forceinline__ bool is_below(int i, int count) {
    return (i + 1) * THREADS <= count || threadIdx.x + i * THREADS < count;
}

// SwiGLU, times Y; rows from DENSE on are zero.
__device__ __forceinline__ void sylvester(
    float (&v)[OWN][4], const int* sum, float x_scale, const float* __restrict__ scale_R, const float* __restrict__ bias_R) {
    const int first = gate_row(threadIdx.x * 4);
    auto from = [&](int i) { return is_below(i, DENSE * QUADS) ? first + i * THREADS * 8 : 0; };  // gate_row of its column
    int4 gate[OWN], up[OWN];
    auto ask = [&](int i) {
        gate[i] = load_now((const int4*)(sum + from(i)));
        up[i] = load_now((const int4*)(sum + from(i) + 8));
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ask(i);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const float* const bias = BIASED ? bias_R : nullptr;
        const Rows gate_rows(scale_R, bias, from(i)), up_rows(scale_R, bias, from(i) + 8);
        const float4 z = silu_times(gate_rows(gate[i], x_scale), up_rows(up[i], x_scale));
        if (i + AHEAD < OWN) ask(i + AHEAD);
        const bool there = is_below(i, DENSE * QUADS);
        v[i][0] = there ? z.x : 0.0f, v[i][1] = there ? z.y : 0.0f, v[i][2] = there ? z.z : 0.0f, v[i][3] = there ? z.w : 0.0f;
        sylvester_of_row<COLUMNS>(v[i]);
    }
}

// Both as f16, as a pair; and what that leaves.
__device__ __forceinline__ u32 split_halves(float& a, float& b) {
    const u32 pair = half_pair(a, b);
    a -= float_from_half((u16)pair);
    b -= float_from_half((u16)(pair >> 16));
    return pair;
}

// Times factor, as terms.
__device__ __forceinline__ void store(u16* terms, float (&v)[OWN][4], float factor) {
    const int column = threadIdx.x % QUADS * 4;
    u16* const row = terms + threadIdx.x / QUADS * STRIDE;
    u16* const low = row + stored_column(column);
    u16* const high = row + stored_column(column + 2);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        if (!is_below(i, COUNT)) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] *= factor;
#pragma unroll
        for (int term = 0; term < 2; ++term) {
            const int at = i * (THREADS / QUADS) * STRIDE + term * TERM;
            *(u32*)(low + at) = split_halves(v[i][0], v[i][1]);
            *(u32*)(high + at) = split_halves(v[i][2], v[i][3]);
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
    __shared__ u32 scratch[32];
    u32 peak = 0;
    float v[OWN][4];
    sylvester(v, sum_MR + token * rows, scale[token], scale_R, bias_R);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) peak = max(peak, magnitude(v[i][j]));
    const u32 exponent = min(268 - (int)(block_peak(peak, scratch) >> 23), 253);
    store(terms, v, __uint_as_float(exponent << 23));
    const float back = __uint_as_float((254 - exponent) << 23);  // the inverse
    __syncthreads();

    float out[PASSES][MT][2][2 * NT];
    peak = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int span = (pass * WARP_SPANS + warp % WARP_SPANS) * 8 * NT;
        const u32 own = shared_address(terms + lane % 16 * STRIDE + (NT > 1 ? lane / 16 * 8 : 0) + span);
        float sums[2][MT][NT][4] = {};  // of either term
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
                    for (int j = 0; j < 4; ++j) a[i][j] = signs(word[i], step, j, 0x3c003c00);
#pragma unroll
                for (int term = 0; term < 2; ++term) {
                    u32 b[2 * NT];
                    load_tiles(b, own + (4 * k_word + step) * 16 * STRIDE * 2 + term * TERM * 2);
#pragma unroll
                    for (int i = 0; i < MT; ++i)
#pragma unroll
                        for (int t = 0; t < NT; ++t)
                            mma(sums[term][i][t], a[i][0], a[i][1], a[i][2], a[i][3], b[2 * t], b[2 * t + 1]);
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

    peak = block_peak(peak, scratch);
    const TokenScale of_token = token_scale(__fmul_rn(__uint_as_float(peak), back), clip, code_bits);
    if (threadIdx.x == 0) scale[token] = of_token.scale;
    Coder coder(of_token, code_bits);
    coder.inverse = __fmul_rn(coder.inverse, back);
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
