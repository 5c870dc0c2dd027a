// Attention over the packed KV cache (SPEC.md, "Attention", step 6, and "KV cache") on tensor cores: what one warp does.
//
// A vector is low + step * code. prefill_attention.cu reads codes as f16 integers c' = code - 2^(BITS - 1), and a vector as
// mid + step * c'; attention.cu, whose codes are used once, takes their bits as a subnormal f16, which is code * 2^-24 or,
// four bits higher, code * 2^-20: both exact. The other operand, q or step * weight, is the sum of two f16 (hi + lo * 2^-11,
// after a scaling by a power of two), 22 bits and sign, accumulated in f32. A "column" is one query head of one query token;
// each takes two of the 8 columns of an mma.
//
// Shapes: M query tokens, H query heads, G KV heads, R = H / G, D = HEAD_DIM, T = capacity (a multiple of 32), N slots.
//   q       f32 [M][H * D]
//   keys    u32 [N][G][T][P / 2S]: P = D padded to a multiple of 8S, S = 16 / BITS; word w holds channels 2S * w + i at
//           bits BITS * i
//   values  u32 [N][G][T / 2][P / S]: two tokens together; word w holds channels S * w + i of the even token at bits
//           BITS * i, of the odd token at bits 16 + BITS * i
//   scales  u32 [N][G][T][2]: low (f16, lower half) and step (f16, upper half) of the key, then of the value
//   out     f32 [M][H * D]
// What the cache holds at positions that are not visible is never used, NaN or not. Limits: D even, at most 512.
//
// The including file defines HEAD_DIM and BITS (4 or 8).
#pragma once
#include "common.cuh"

constexpr int UNIT = 16 / BITS;                                      // S: codes in half a word
constexpr int PADDED = (HEAD_DIM + 8 * UNIT - 1) / (8 * UNIT) * (8 * UNIT);  // P
constexpr int WORDS = PADDED / (8 * UNIT);                           // of a lane: per key, per pair of values
constexpr int VECTOR = WORDS % 4 == 0 ? 4 : WORDS % 2 == 0 ? 2 : 1;  // words of one load
constexpr int STEPS = PADDED / 16;                                   // mma's of a key, or of 16 values
constexpr int ROW_WORDS = PADDED / (2 * UNIT);
constexpr float CENTRE = 1 << (BITS - 1);
constexpr float LO = 1.0f / 2048.0f;                                 // what the lower f16 of a number counts
constexpr float NEVER = -3.0e38f;                                    // the score of what is not visible

// Codes number s of both halves of a word, centred, as two f16. 0x6400 + c is the f16 1024 + c.
__device__ __forceinline__ u32 centred(u32 word, int s) {
#if BITS == 4
    const u32 shifted = s < 2 ? word : word >> 8;
    if (s % 2 == 0) return add_half2(masked_or(shifted, 0x000f000fu, 0x64006400u), 0xe408e408u);  // - 1032
    return multiply_add_half2(masked_or(shifted, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);  // / 16 - 72
#else
    return add_half2(__byte_perm(word, 0x64646464u, s == 0 ? 0x4240 : 0x4341), 0xe480e480u);  // - 1152
#endif
}

// Codes number s of both halves of a word as two f16: code / CODES or, for BITS 4 and odd s, code / ODD_CODES.
constexpr float CODES = 16777216.0f, ODD_CODES = BITS == 4 ? CODES / 16 : CODES;
__device__ __forceinline__ u32 codes_of(u32 word, int s) {
#if BITS == 4
    return (s < 2 ? word : word >> 8) & (s % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
#else
    return s == 0 ? word & 0x00ff00ffu : __byte_perm(word, 0, 0x4341);
#endif
}

// x = hi + lo * 2^-11 with hi in the lower half. |x| at most 2^15.
__device__ __forceinline__ u32 split(float x) {
    const u16 hi = half_from_float(x);
    const u16 lo = half_from_float((x - float_from_half(hi)) * 2048.0f);
    return hi | (u32)lo << 16;
}

// Powers of two for a query whose largest magnitude is peak: 2^(e - 127) <= peak < 2^(e - 126), times 2^(141 - e) it is
// below 2^15; and back.
__device__ __forceinline__ int query_exponent(float peak) { return max(__float_as_int(peak) >> 23, 30); }
__device__ __forceinline__ float scaled_up(float peak) { return __int_as_float((268 - query_exponent(peak)) << 23); }
__device__ __forceinline__ float scaled_down(float peak) { return __int_as_float((query_exponent(peak) - 14) << 23); }

// A lane's words of one key (lanes = 4) or of one pair of values (lanes = 8).
__device__ __forceinline__ void load_words(u32 (&words)[WORDS], const u32* row, int lane, int lanes) {
#pragma unroll
    for (int i = 0; i < WORDS; i += VECTOR) {
        const u32* from = row + i * lanes + lane * VECTOR;
        if constexpr (VECTOR == 4) {
            const uint4 w = *reinterpret_cast<const uint4*>(from);
            words[i] = w.x, words[i + 1] = w.y, words[i + 2] = w.z, words[i + 3] = w.w;
        } else if constexpr (VECTOR == 2) {
            const uint2 w = *reinterpret_cast<const uint2*>(from);
            words[i] = w.x, words[i + 1] = w.y;
        } else {
            words[i] = *from;
        }
    }
}
__device__ __forceinline__ int word_index(int i, int lane, int lanes) {
    return i / VECTOR * VECTOR * lanes + lane * VECTOR + i % VECTOR;
}

struct Scale {
    float mid, step;
};
__device__ __forceinline__ Scale scale_of(u32 bits) {
    const float low = float_from_half((u16)bits), step = float_from_half((u16)(bits >> 16));
    return {fmaf(CENTRE, step, low), step};
}

// One KV head's sequence in the cache.
struct Sequence {
    const u32 *keys, *values;
    const uint2* scales;
};
__device__ __forceinline__ Sequence sequence(
    const u32* keys, const u32* values, const uint2* scales, int slot, int kv_head, int kv_heads, int capacity) {
    const i64 vectors = ((i64)slot * kv_heads + kv_head) * capacity;
    return {keys + vectors * ROW_WORDS, values + vectors * ROW_WORDS, scales + vectors};
}

// What one warp knows of its columns, 4 to a tile: queries, and the softmax so far. In lane (g, j), tile n: q of column
// 4n + g / 2, hi for even g and lo for odd g; everything else of column 4n + j.
template <int N_TILES>
struct Columns {
    static constexpr int COUNT = 4 * N_TILES;
    static constexpr int BLOCKS_OF_16 = N_TILES == 1 && WORDS <= 4 ? 2 : 1;
    static constexpr int TOKENS = 16 * BLOCKS_OF_16;  // of a tile of the sequence

    u32 q[N_TILES][STEPS][2];
    float factor[N_TILES], sum[N_TILES];  // score = step * dot * factor + low * sum, in powers of two
    int position[N_TILES];              // of the query; -1: no such column
    float acc[N_TILES][STEPS][4];       // Σ weight * step * code: channels of 2 rows, hi and lo
    float peak[N_TILES];                // weight = 2^(score - peak), so that weight * step is at most 2^14
    float total[N_TILES], low[N_TILES];   // Σ weight, Σ weight * low; of the tokens of this lane

    // As at first: no token seen yet.
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            peak[n] = NEVER;
            total[n] = low[n] = 0.0f;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[n][step][c] = 0.0f;
        }
    }

    // Σ q * code of a tile's keys.
    __device__ __forceinline__ void multiply_keys(float (&dot)[BLOCKS_OF_16][N_TILES][4],
                                                  const u32 (&key)[BLOCKS_OF_16][2][WORDS]) const {
        constexpr int CHAINS = N_TILES == 1 && UNIT > 2 ? 2 : 1;  // an mma waits for the one before it in its chain
        float part[CHAINS][BLOCKS_OF_16][N_TILES][4] = {};
#pragma unroll
        for (int i = 0; i < WORDS; i++)
#pragma unroll
            for (int b = 0; b < BLOCKS_OF_16; b++)
#pragma unroll
                for (int h = 0; h < UNIT / 2; h++) {
                    const u32 a0 = codes_of(key[b][0][i], 2 * h), a1 = codes_of(key[b][1][i], 2 * h);
                    const u32 a2 = codes_of(key[b][0][i], 2 * h + 1), a3 = codes_of(key[b][1][i], 2 * h + 1);
                    const int step = i * (UNIT / 2) + h;
#pragma unroll
                    for (int n = 0; n < N_TILES; n++)
                        mma(part[h % CHAINS][b][n], a0, a1, a2, a3, q[n][step][0], q[n][step][1]);
                }
#pragma unroll
        for (int b = 0; b < BLOCKS_OF_16; b++)
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    dot[b][n][c] = CHAINS == 1 ? part[0][b][n][c] : part[0][b][n][c] + part[CHAINS - 1][b][n][c];
    }

    // acc += weights of softmax() times the codes of a tile's values.
    __device__ __forceinline__ void add_values(const u32 (&weight)[BLOCKS_OF_16][N_TILES][2],
                                               const u32 (&value)[BLOCKS_OF_16][2][WORDS]) {
        const int g = (threadIdx.x & 31) >> 2, j = threadIdx.x & 3;
#pragma unroll
        for (int b = 0; b < BLOCKS_OF_16; b++) {
            u32 even[N_TILES], odd[N_TILES];  // tokens 2j, 2j + 1 and 2j + 8, 2j + 9 of column 4n + g / 2
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                even[n] = transposed(weight[b][n][0], g, j);
                odd[n] = transposed(weight[b][n][1], g, j);
            }
#pragma unroll
            for (int i = 0; i < WORDS; i++)
#pragma unroll
                for (int h = 0; h < UNIT / 2; h++) {
                    const u32 a0 = codes_of(value[b][0][i], 2 * h), a1 = codes_of(value[b][0][i], 2 * h + 1);
                    const u32 a2 = codes_of(value[b][1][i], 2 * h), a3 = codes_of(value[b][1][i], 2 * h + 1);
#pragma unroll
                    for (int n = 0; n < N_TILES; n++)
                        mma(acc[n][i * (UNIT / 2) + h], a0, a1, a2, a3, even[n], odd[n]);
                }
        }
    }

    // Weights times step of tokens token + 16b + 8 * half, as split() gives them; keeps peak, total, low and acc.
    __device__ __forceinline__ void softmax(
        u32 (&weight)[BLOCKS_OF_16][N_TILES][2], const float (&dot)[BLOCKS_OF_16][N_TILES][4],
        const uint2 (&scale)[BLOCKS_OF_16][2], int token, int first, int last, int window) {
        float value_low[BLOCKS_OF_16][2], value_step[BLOCKS_OF_16][2];
        float score[BLOCKS_OF_16][N_TILES][2], highest[N_TILES];
#pragma unroll
        for (int n = 0; n < N_TILES; n++) highest[n] = peak[n];
#pragma unroll
        for (int b = 0; b < BLOCKS_OF_16; b++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int t = token + 16 * b + 8 * half;
                const bool written = first <= t && t <= last;
                const u32 key = written ? scale[b][half].x : 0, value = written ? scale[b][half].y : 0;
                const float key_low = float_from_half((u16)key), key_step = float_from_half((u16)(key >> 16));
                value_low[b][half] = float_from_half((u16)value);
                value_step[b][half] = float_from_half((u16)(value >> 16));
                // step < 2^exponent; the exponent as a float by way of 2^23 + e
                const u32 biased = (__float_as_uint(value_step[b][half]) >> 23) | 0x4b000000u;
                const float exponent = __uint_as_float(biased) - (8388608.0f + 126.0f);
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    const float sum_qc = fmaf(dot[b][n][2 * half + 1], LO, dot[b][n][2 * half]) * factor[n];
                    const float s = fmaf(sum_qc, key_step, key_low * sum[n]);
                    const bool visible = (u32)(position[n] - t) < (u32)window;
                    score[b][n][half] = visible ? s : NEVER;
                    if (visible) highest[n] = fmaxf(highest[n], s + (exponent - 14.0f));
                }
            }
        bool higher = false;
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            for (int lanes = 4; lanes < 32; lanes *= 2)
                highest[n] = fmaxf(highest[n], __shfl_xor_sync(FULL_MASK, highest[n], lanes));
            higher |= highest[n] > peak[n];
        }
        if (__any_sync(FULL_MASK, higher)) {
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                const float shrink = exp2_approx(peak[n] - highest[n]);
                peak[n] = highest[n];
                total[n] *= shrink;
                low[n] *= shrink;
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int c = 0; c < 4; c++) acc[n][step][c] *= shrink;
            }
        }
#pragma unroll
        for (int b = 0; b < BLOCKS_OF_16; b++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    const float s = score[b][n][half];
                    const float p = s == NEVER ? 0.0f : exp2_approx(s - peak[n]);
                    total[n] += p;
                    low[n] = fmaf(p, value_low[b][half], low[n]);
                    weight[b][n][half] = split(p * value_step[b][half]);
                }
    }

    // total and low of the tokens of all lanes; once, at the end.
    __device__ __forceinline__ void add_lanes() {
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                total[n] += __shfl_xor_sync(FULL_MASK, total[n], lanes);
                low[n] += __shfl_xor_sync(FULL_MASK, low[n], lanes);
            }
    }

    // Calls store(n, channel, UNIT sums) for what this lane holds of column 4n + j.
    template <typename Store>
    __device__ __forceinline__ void for_each_unit(Store store) const {
        const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                float x[UNIT];
#pragma unroll
                for (int s = 0; s < UNIT; s++) {
                    const float* c = acc[n][i * (UNIT / 2) + s / 2] + s % 2 * 2;
                    x[s] = fmaf(fmaf(c[1], LO, c[0]), s % 2 ? ODD_CODES : CODES, low[n]);
                }
                store(n, word_index(i, g, 8) * UNIT, x);
            }
    }

  private:
    // From weights of (token g, column j) to those of (tokens 2j and 2j + 1, column g / 2), hi or lo by the parity of g.
    __device__ __forceinline__ u32 transposed(u32 weight, int g, int j) const {
        const u32 a = __shfl_sync(FULL_MASK, weight, 8 * j + g / 2);
        const u32 b = __shfl_sync(FULL_MASK, weight, 8 * j + 4 + g / 2);
        return __byte_perm(a, b, g & 1 ? 0x7632 : 0x5410);
    }
};
