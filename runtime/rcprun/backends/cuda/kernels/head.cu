// Head (SPEC.md, "Head"): logits of up to 8·RCP_TILES tokens, in the table's own layout, at the speed of memory.
//
//   table   i8   [V][RCP_D]        head_int8, or f16 (head_half: RCP_HALF)
//   scale   f32  [V]               row scales; not there for f16
//   codes   i8   [M][kpad]         int8: quantized tokens, zeros from RCP_D on; kpad a multiple of 128, and
//   token   f32  [M]               their scales; or
//   h       f32  [M][RCP_D]        f16: tokens, rounded to f16 here
//   logits  f32  [M][V]            out
//
// Dynamic shared memory: 4·(2·RCP_WARPS·RCP_TILES·160) bytes of partial sums, then M rows of TOKEN_STRIDE bytes.
// Block 32·RCP_WARPS; any grid: blocks stride over the tiles of 16 rows. Table aligned to 16 bytes.
//
// A block computes 16 rows of the table at a time; its warps share out the units of 128 bytes of a row. Within a unit,
// lane (g = lane / 4, t = lane % 4) reads the 16-byte chunks t and 4 + t of rows g and g + 8: a warp's load covers 64
// adjacent bytes of 8 rows. The order of a contraction is free, so that chunk words 2i and 2i + 1 of both operands are
// registers of the i-th mma: A = table (16 rows), B = tokens (8 columns; lane's column is g), from shared memory, whose
// row stride is 64 modulo 128 bytes: the 8 lanes of a 128-byte access then touch 8 distinct groups of banks.
// int8 sums are exact. f16 products are too, and are summed in f32 by the tensor core, whose additions truncate.
#include "common.cuh"

#ifndef RCP_D
#error "RCP_D: columns of the table"
#endif
#ifndef RCP_HALF
#error "RCP_HALF: 1 for a f16 table, 0 for int8"
#endif
#ifndef RCP_WARPS
#error "RCP_WARPS: warps in a block"
#endif
#ifndef RCP_TILES
#error "RCP_TILES: tokens of a launch, in eights, rounded up"
#endif

constexpr int SIZE = RCP_HALF ? 2 : 1;                       // bytes of a table entry
constexpr int ROW_BYTES = RCP_D * SIZE;                      // of the table
constexpr int UNITS = (ROW_BYTES + 127) / 128;               // of a row
constexpr int TURNS = (UNITS + RCP_WARPS - 1) / RCP_WARPS;   // units of a row that one warp computes
constexpr int STAGES = 4;                                    // units that one warp has in flight
constexpr int TOKEN_STRIDE = UNITS * 128 + 64;               // bytes of a token's row in shared memory
constexpr int COLUMN = 20;                                   // of partial sums: 16 rows, spread over the banks
constexpr int PARTIAL = RCP_TILES * 8 * COLUMN;              // partial sums of one warp

#if RCP_HALF
typedef float Sum;
#else
typedef i32 Sum;
#endif

// One lane's part of 16 rows × 128 bytes: chunks t and 4 + t of row g, then of row g + 8.
struct Unit {
    uint4 chunk[2][2];
};

__device__ __forceinline__ u32 word_of(const uint4& chunk, int i) {
    return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

// 16 bytes of a table's row from `byte` on; zeros after its end.
__device__ __forceinline__ uint4 load_chunk(const u8* row, int byte) {
    if constexpr (ROW_BYTES % 16 == 0) {
        return byte < ROW_BYTES ? load_once(row + byte) : make_uint4(0, 0, 0, 0);
    } else {
        u32 word[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (byte + i < ROW_BYTES) word[i / 4] |= (u32)row[byte + i] << (8 * (i % 4));
        return make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// This warp's place in the stream of units that its block computes: turn by turn within a tile, tile by tile.
struct Place {
    i32 tile, turn;

    __device__ __forceinline__ void advance() {
        if (++turn == TURNS) turn = 0, tile += gridDim.x;
    }
    __device__ __forceinline__ void load(Unit& unit, const u8* table, i32 V) const {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        const int byte = (turn * RCP_WARPS + warp) * 128 + (lane & 3) * 16;
        if (tile * 16 >= V || byte - (lane & 3) * 16 >= ROW_BYTES) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 row = min(tile * 16 + half * 8 + (lane >> 2), V - 1);
            const u8* const begin = table + (i64)row * ROW_BYTES;
            unit.chunk[half][0] = load_chunk(begin, byte);
            unit.chunk[half][1] = load_chunk(begin, byte + 64);
        }
    }
};

// Adds one unit's products to the sums of each eight of tokens.
__device__ __forceinline__ void multiply(Sum (&sum)[RCP_TILES][4], const Unit& unit, int turn, const u8* tokens, i32 M) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int index = turn * RCP_WARPS + warp;
    if (index >= UNITS) return;
#pragma unroll
    for (int tile = 0; tile < RCP_TILES; ++tile) {
        const int column = tile * 8 + (lane >> 2);
        const u8* const token = tokens + column * TOKEN_STRIDE + index * 128 + (lane & 3) * 16;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const uint4 b = column < M ? *(const uint4*)(token + c * 64) : make_uint4(0, 0, 0, 0);
            const uint4 &low = unit.chunk[0][c], &high = unit.chunk[1][c];
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                mma(sum[tile], word_of(low, i), word_of(high, i), word_of(low, i + 1), word_of(high, i + 1),
                    word_of(b, i), word_of(b, i + 1));
        }
    }
}

// Adds the warps' sums of one tile up and hands each to out(row of the table, token, sum). `partial` must not be
// that of the tile before.
template <class Out>
__device__ __forceinline__ void finish(Sum (&sum)[RCP_TILES][4], Sum* partial, i32 first_row, i32 V, i32 M, Out out) {
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int tile = 0; tile < RCP_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            partial[warp * PARTIAL + (tile * 8 + 2 * t + i % 2) * COLUMN + g + i / 2 * 8] = sum[tile][i];
            sum[tile][i] = 0;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < M * 16; i += RCP_WARPS * 32) {
        const int token = i / 16, row = i % 16;
        Sum total = 0;
#pragma unroll
        for (int w = 0; w < RCP_WARPS; ++w) total += partial[w * PARTIAL + token * COLUMN + row];
        if (first_row + row < V) out(first_row + row, token, total);
    }
}

// load_tokens(shared memory) runs after the first weights are on their way.
template <class LoadTokens, class Out>
__device__ __forceinline__ void head(const u8* table, i32 V, i32 M, LoadTokens load_tokens, Out out) {
    extern __shared__ __align__(128) u8 shared[];
    Sum* const partial = (Sum*)shared;
    u8* const tokens = shared + 2 * RCP_WARPS * PARTIAL * sizeof(Sum);
    pdl_launch();
    Unit ring[STAGES] = {};
    Place ahead = {(i32)blockIdx.x, 0}, here = ahead;
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        ahead.load(ring[s], table, V);
        ahead.advance();
    }
    pdl_wait();
    load_tokens(tokens);
    __syncthreads();
    Sum sum[RCP_TILES][4] = {};
    int parity = 0;
    while (here.tile * 16 < V) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) {
            if (here.tile * 16 >= V) break;
            multiply(sum, ring[s], here.turn, tokens, M);
            ahead.load(ring[s], table, V);
            ahead.advance();
            if (here.turn == TURNS - 1) {
                finish(sum, partial + parity * RCP_WARPS * PARTIAL, here.tile * 16, V, M, out);
                parity ^= 1;
            }
            here.advance();
        }
    }
}

#if RCP_HALF
extern "C" __global__ void __launch_bounds__(32 * RCP_WARPS)
    head_half(const u8* table, const float* h, float* logits, i32 V, i32 M) {
    head(
        table, V, M,
        [=](u8* tokens) {
            for (int i = threadIdx.x; i < M * UNITS * 64; i += RCP_WARPS * 32) {
                const int token = i / (UNITS * 64), d = i % (UNITS * 64);
                const float x = d < RCP_D ? h[(i64)token * RCP_D + d] : 0.0f;
                ((u16*)(tokens + token * TOKEN_STRIDE))[d] = half_from_float(x);
            }
        },
        [=](i32 row, int token, float sum) { logits[(i64)token * V + row] = sum; });
}
#else
extern "C" __global__ void __launch_bounds__(32 * RCP_WARPS)
    head_int8(const u8* table, const float* scale, const i8* codes, const float* token_scale, float* logits, i32 V,
              i32 M, i32 kpad) {
    head(
        table, V, M,
        [=](u8* tokens) {
            for (int i = threadIdx.x; i < M * UNITS * 8; i += RCP_WARPS * 32) {
                const int token = i / (UNITS * 8), chunk = i % (UNITS * 8);
                const i8* const row = codes + (i64)token * kpad;
                *(uint4*)(tokens + token * TOKEN_STRIDE + chunk * 16) = ((const uint4*)row)[chunk];
            }
        },
        [=](i32 row, int token, i32 sum) {
            logits[(i64)token * V + row] = __fmul_rn(__fmul_rn((float)sum, token_scale[token]), scale[row]);
        });
}
#endif
