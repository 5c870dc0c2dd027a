// Head (SPEC.md, "Head"): logits of up to 8·RCP_TILES tokens, in the table's own layout, at the speed of memory.
//
//   table   i8   [V][RCP_D]        head_int8, or f16 (head_half: RCP_HALF)
//   scale   f32  [V]               row scales; not there for f16
//   codes   i8   [M][kpad]         int8: quantized tokens, zeros from RCP_D on; kpad a multiple of 128, and
//   token   f32  [M]               their scales; or
//   h       f32  [M][RCP_D]        f16: tokens, rounded to f16 here
//   logits  f32  [M][V]            out
//
// Dynamic shared memory: RCP_WARPS·RCP_STAGES·STAGE_BYTES of the table, then M rows of TOKEN_STRIDE bytes, then
// 8·RCP_WARPS·RCP_STAGES bytes of barriers. Block 32·RCP_WARPS; any grid. Table aligned to 16 bytes.
//
// Each warp has an equal share of adjacent rows, in tiles of up to 8, and streams them, RCP_SEGMENT bytes of a tile's
// rows at a time, through a ring of its own: bulk copies, cp.async, or single bytes where rows are not
// aligned to 16 bytes. Warps never wait for each other.
// In 64 bytes of rows, lane (g = lane / 4, t = lane % 4) has chunk t of 16 bytes of row g, and of tokens g and 8 + g. The
// order of a contraction is free, so that chunk words 2i and 2i + 1 of both operands are registers of the i-th mma:
// A = tokens (16 rows), B = table (8 columns). Strides are 64 modulo 128 bytes: the 8 lanes of a 128-byte access to
// shared memory touch 8 distinct groups of banks.
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
#ifndef RCP_SEGMENT
#error "RCP_SEGMENT: bytes of a row in a stage, 512 or 1,024"
#endif
#ifndef RCP_STAGES
#error "RCP_STAGES: of each warp's ring"
#endif
#ifndef RCP_BULK
#error "RCP_BULK: 1 for bulk copies where there are any, 0 for cp.async"
#endif

#define BULK (RCP_HOPPER && RCP_BULK)

constexpr int SIZE = RCP_HALF ? 2 : 1;                             // bytes of a table entry
constexpr int ROW_BYTES = RCP_D * SIZE;                            // of the table
constexpr int PADDED = (ROW_BYTES + 127) / 128 * 128;              // of a token's row
constexpr int SEGMENTS = (ROW_BYTES + RCP_SEGMENT - 1) / RCP_SEGMENT;
constexpr int TILE = 8;                                            // rows of the table
constexpr int STRIDE = RCP_SEGMENT + 64;                           // bytes between a stage's rows
constexpr int STAGE_BYTES = TILE * STRIDE;
constexpr int TOKEN_STRIDE = PADDED + 64;                          // bytes between tokens in shared memory
constexpr int PAIRS = (RCP_TILES + 1) / 2;                         // of eights of tokens
constexpr bool ALIGNED = ROW_BYTES % 16 == 0;
static_assert(RCP_SEGMENT % 512 == 0);

#if RCP_HALF
typedef float Sum;
#else
typedef i32 Sum;
#endif

// The rows of this warp, and its ring.
struct Stream {
    i32 from, to, tiles;  // rows, fewer than 2^17, and tiles of them
    i32 tile, segment;    // the next to ask for
    u32 buffer, barriers;

    __device__ __forceinline__ Stream(i32 V, u32 ring, u32 all_barriers) {
        const int warp = threadIdx.x >> 5;
        const i64 index = blockIdx.x * RCP_WARPS + warp, all = gridDim.x * RCP_WARPS;
        from = (i32)(V * index / all), to = (i32)(V * (index + 1) / all);
        tiles = (to - from + TILE - 1) / TILE, tile = segment = 0;
        buffer = ring + warp * RCP_STAGES * STAGE_BYTES;
        barriers = all_barriers + warp * RCP_STAGES * 8;
    }
    // First row of a tile; tiles are as equal as can be.
    __device__ __forceinline__ i32 row(i32 tile) const { return from + (i32)((u32)(to - from) * tile / tiles); }

    __device__ __forceinline__ void start(const u8* table) {
#if BULK
        if (ALIGNED && (threadIdx.x & 31) == 0) {
            for (int i = 0; i < RCP_STAGES; ++i) barrier_init(barriers + i * 8);
            barrier_init_done();
        }
        __syncwarp();
#endif
#pragma unroll
        for (int i = 0; i < RCP_STAGES; ++i) request(table, i);
    }

    // Asks for the next stage, into a slot whose bytes every lane has used.
    __device__ __forceinline__ void request(const u8* table, int slot) {
        if (tile < tiles) {
            const int lane = threadIdx.x & 31;
            const i32 first = row(tile), count = row(tile + 1) - first;
            const int begin = segment * RCP_SEGMENT, bytes = min(RCP_SEGMENT, ROW_BYTES - begin);
            const u8* const source = table + (i64)first * ROW_BYTES + begin;
            const u32 place = buffer + slot * STAGE_BYTES;
            if constexpr (!ALIGNED) {
                for (i32 r = 0; r < count; ++r)
                    for (int i = lane * 4; i < (bytes + 15 & ~15); i += 128) {
                        u32 word = 0;
                        for (int j = 0; j < 4; ++j)
                            if (i + j < bytes) word |= (u32)source[(i64)r * ROW_BYTES + i + j] << 8 * j;
                        store1(place + r * STRIDE + i, word);
                    }
            } else {
#if BULK
                if (lane == 0) barrier_expect(barriers + slot * 8, count * bytes);
                __syncwarp();
                if (lane < count)
                    copy_bulk(place + lane * STRIDE, source + (i64)lane * ROW_BYTES, bytes, barriers + slot * 8);
#else
                for (i32 r = 0; r < count; ++r)
                    for (int i = lane * 16; i < bytes; i += 512)
                        copy_async(place + r * STRIDE + i, source + (i64)r * ROW_BYTES + i);
#endif
            }
            if (++segment == SEGMENTS) segment = 0, ++tile;
        }
#if !BULK
        if constexpr (ALIGNED) commit_copies();
#endif
    }

    // Until a slot's bytes are there for every lane. Slots come round in order; parity: of the round.
    __device__ __forceinline__ void wait(int slot, int parity) const {
#if BULK
        if constexpr (ALIGNED) return barrier_wait(barriers + slot * 8, parity);
#else
        if constexpr (ALIGNED) wait_for_copies<RCP_STAGES - 1>();
#endif
        __syncwarp();
    }
};

// Adds the products of one stage to the sums of each 16 tokens; even and odd steps have sums of their own.
__device__ __forceinline__ void multiply(Sum (&sum)[PAIRS][2][4], u32 stage, int segment, u32 tokens, i32 M) {
    const int g = (threadIdx.x & 31) >> 2, chunk = (threadIdx.x & 3) * 16;
    const u32 row = stage + g * STRIDE + chunk;
    const int begin = segment * RCP_SEGMENT;
#pragma unroll
    for (int i = 0; i < RCP_SEGMENT; i += 64) {
        if (SEGMENTS * RCP_SEGMENT != PADDED && begin + i >= ROW_BYTES) break;
        const bool there = ROW_BYTES % 64 == 0 || begin + i + chunk < ROW_BYTES;
        const uint4 b = there ? load4(row + i) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            // Tokens from M on are the last one once more; no one looks at their sums.
            const u32 column = tokens + begin + i + chunk;
            const uint4 low = load4(column + min(pair * 16 + g, M - 1) * TOKEN_STRIDE);
            uint4 high = make_uint4(0, 0, 0, 0);
            if (pair * 2 + 1 < RCP_TILES) high = load4(column + min(pair * 16 + 8 + g, M - 1) * TOKEN_STRIDE);
            Sum(&c)[4] = sum[pair][i / 64 % 2];
            mma(c, low.x, high.x, low.y, high.y, b.x, b.y);
            mma(c, low.z, high.z, low.w, high.w, b.z, b.w);
        }
    }
}

// load_tokens(shared memory) runs after the first weights are on their way; out(row of the table, its factor, token,
// sum).
template <class LoadTokens, class Factor, class Out>
__device__ __forceinline__ void head(
    const u8* table, i32 V, i32 M, LoadTokens load_tokens, Factor factor_of, Out out) {
    extern __shared__ __align__(128) u8 shared[];
    constexpr int RING_BYTES = RCP_WARPS * RCP_STAGES * STAGE_BYTES;
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const u32 tokens = shared_address(shared) + RING_BYTES;
    pdl_launch();
    Stream stream(V, shared_address(shared), tokens + M * TOKEN_STRIDE);
    stream.start(table);
    pdl_wait();
    load_tokens(shared + RING_BYTES);
    __syncthreads();
    int slot = 0, parity = 0;
    for (i32 tile = 0; tile < stream.tiles; ++tile) {
        const i32 first = stream.row(tile) + 2 * t, end = stream.row(tile + 1);
        const float factor[2] = {factor_of(min(first, V - 1)), factor_of(min(first + 1, V - 1))};
        Sum sum[PAIRS][2][4] = {};
        for (int segment = 0; segment < SEGMENTS; ++segment) {
            stream.wait(slot, parity);
            multiply(sum, stream.buffer + slot * STAGE_BYTES, segment, tokens, M);
            __syncwarp();
            stream.request(table, slot);
            if (++slot == RCP_STAGES) slot = 0, parity ^= 1;
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = pair * 16 + i / 2 * 8 + g;
                const i32 row = first + i % 2;
                if (token < M && row < end) out(row, factor[i % 2], token, sum[pair][0][i] + sum[pair][1][i]);
            }
        }
    }
}

#if RCP_HALF
extern "C" __global__ void __launch_bounds__(32 * RCP_WARPS)
    head_half(const u8* table, const float* h, float* logits, i32 V, i32 M) {
    head(
        table, V, M,
        [=](u8* tokens) {
            for (int i = threadIdx.x; i < M * (PADDED / 2); i += RCP_WARPS * 32) {
                const int token = i / (PADDED / 2), d = i % (PADDED / 2);
                const float x = d < RCP_D ? h[(i64)token * RCP_D + d] : 0.0f;
                ((u16*)(tokens + token * TOKEN_STRIDE))[d] = half_from_float(x);
            }
        },
        [](i32) { return 1.0f; },
        [=](i32 row, float, int token, float sum) { logits[(i64)token * V + row] = sum; });
}
#else
extern "C" __global__ void __launch_bounds__(32 * RCP_WARPS)
    head_int8(const u8* table, const float* scale, const i8* codes, const float* token_scale, float* logits, i32 V,
              i32 M, i32 kpad) {
    head(
        table, V, M,
        [=](u8* tokens) {
            for (int i = threadIdx.x; i < M * (PADDED / 16); i += RCP_WARPS * 32) {
                const int token = i / (PADDED / 16), chunk = i % (PADDED / 16);
                const i8* const row = codes + (i64)token * kpad;
                *(uint4*)(tokens + token * TOKEN_STRIDE + chunk * 16) = ((const uint4*)row)[chunk];
            }
        },
        [=](i32 row) { return scale[row]; },
        [=](i32 row, float factor, int token, i32 sum) {
            logits[(i64)token * V + row] = __fmul_rn(__fmul_rn((float)sum, token_scale[token]), factor);
        });
}
#endif
