// A 2-bit linear layer for 1 to 8 tokens (SPEC.md, "Linear"), with what comes before and after it.
//
//   unit_TU     u8  [tiles][units][UNIT_BYTES]   weights as repack.cu leaves them: 16 rows x 128 columns a unit
//   scale_R     f32 [tiles * 16]                 row scales, in the order of the tiles' rows; 0 in rows that are padding
//   bias_R      f32 [tiles * 16] or null
//   x           f32 [m][k], or i8 codes [m][units * 128] with zeros from k on (PROLOGUE 0)
//   x_scale_M   f32 [m]                          of the codes; PROLOGUE 0 only
//   out         f32 [m][columns]                 columns: rows of the layer, or half of them (EPILOGUE 2)
//   PROLOGUE 0: x is codes.  1: x is normalized (RMSNorm, eps) and quantized (clip, A_BITS).  2: x is quantized.
//   EPILOGUE 0: out = y.  1: out += y.  2: of each tile, rows 0-7 are gate and rows 8-15 up: out = silu(gate) * up.
//   Limits: 1 <= m <= TOKENS (1 or 8); k <= units * 128; k a multiple of 4 for PROLOGUE 1 and 2 with vector loads, else
//   slower ones; int32 sums, so k < 2^31 / 127^2.
//
// Every block owns whole tiles, all columns of them, so that sums never leave it. The tiles' units are one contiguous
// stream, cut evenly among the warps; a warp's part flows through its own ring in shared memory (bulk copies on sm_90,
// cp.async before), filled as far as it goes before the block waits for earlier kernels. A lane (g = lane / 4,
// t = lane % 4) holds the codes of rows g and g + 8 for columns [32 t, 32 t + 32) of a unit; they become int8 levels
// by byte permutation and are the A operand of mma.m16n8k32, whose order of columns is free as long as B agrees. B is
// 32 contiguous bytes of the token n = lane / 4. Warps add their sums (integers: any order) in shared memory.

#include "common.cuh"

#ifndef GROUP
#error "GROUP: weights that share levels, 64 or 128"
#endif
#ifndef TOKENS
#error "TOKENS: 1 or 8"
#endif
#ifndef A_BITS
#error "A_BITS: 4 or 8"
#endif
#ifndef PROLOGUE
#error "PROLOGUE: 0, 1 or 2"
#endif
#ifndef EPILOGUE
#error "EPILOGUE: 0, 1 or 2"
#endif
#ifndef STAGES
#error "STAGES: of each warp's ring"
#endif

#define WARPS 16
#define CODE_BYTES 512
#define UNIT_BYTES (CODE_BYTES + 64 * (128 / GROUP))
#define STAGE_UNITS 2
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)
#define RING_BYTES (WARPS * STAGES * STAGE_BYTES)

// ---- a warp's ring

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

#if RCP_HOPPER
__device__ __forceinline__ void barrier_init(u64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void fill(u64* barrier, u8* to, const u8* from, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void wait_full(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
#else
__device__ __forceinline__ void copy16(u8* to, const u8* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_pending() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

// The stream of one warp: `bytes` of units from `from`, a stage at a time.
struct Ring {
    u8* buffer;
    u64* barriers;
    const u8* from;
    int bytes, filled;  // filled: stages asked for

    __device__ __forceinline__ void request() {
        const int offset = filled * STAGE_BYTES, slot = filled % STAGES, count = min(STAGE_BYTES, bytes - offset);
#if RCP_HOPPER
        if (count > 0 && (threadIdx.x & 31) == 0) fill(barriers + slot, buffer + slot * STAGE_BYTES, from + offset, count);
#else
        for (int i = (threadIdx.x & 31) * 16; i < count; i += 512) copy16(buffer + slot * STAGE_BYTES + i, from + offset + i);
        commit();
#endif
        ++filled;
    }
    __device__ __forceinline__ void start() {
#if RCP_HOPPER
        if ((threadIdx.x & 31) == 0) {
            for (int slot = 0; slot < STAGES; ++slot) barrier_init(barriers + slot);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
#endif
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) request();
    }
    // The bytes of a stage; they are there for every lane.
    __device__ __forceinline__ const u8* wait(int stage) {
        const int slot = stage % STAGES;
#if RCP_HOPPER
        wait_full(barriers + slot, (stage / STAGES) & 1);
#else
        wait_pending<STAGES - 1>();
        __syncwarp();
#endif
        return buffer + slot * STAGE_BYTES;
    }
};

// ---- products

__device__ __forceinline__ void mma(int (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 columns (two products' worth) of rows g and g + 8: 16 codes a word, even ones at bits 4i, odd ones at 4i + 2.
__device__ __forceinline__ void multiply(int (&sum)[4], u32 low, u32 high, u32 levels_low, u32 levels_high, u32 b0, u32 b1,
                                         u32 b2, u32 b3) {
    const u32 mask = 0x33333333u;
    const u32 even_low = low & mask, odd_low = (low >> 2) & mask, even_high = high & mask, odd_high = (high >> 2) & mask;
    mma(sum, __byte_perm(levels_low, 0, even_low), __byte_perm(levels_high, 0, even_high),
        __byte_perm(levels_low, 0, odd_low), __byte_perm(levels_high, 0, odd_high), b0, b1);
    mma(sum, __byte_perm(levels_low, 0, even_low >> 16), __byte_perm(levels_high, 0, even_high >> 16),
        __byte_perm(levels_low, 0, odd_low >> 16), __byte_perm(levels_high, 0, odd_high >> 16), b2, b3);
}

// ---- activations

// Codes of the tokens to code_MK (rows of `stride` bytes, zeros from k on) and their scales; whole block.
__device__ __forceinline__ void load_activations(const void* x, const float* x_scale_M, int m, int k, int padded, float clip,
                                                 float eps, i8* code_MK, int stride, float* scale_M, float* scratch) {
#if PROLOGUE == 0
    const uint4* from = (const uint4*)x;
    const int row = padded / 16;
    for (int i = threadIdx.x; i < m * row; i += blockDim.x)
        *(uint4*)(code_MK + (i / row) * stride + (i % row) * 16) = __ldcg(from + i);
    if (threadIdx.x < m) scale_M[threadIdx.x] = __ldcg(x_scale_M + threadIdx.x);
#else
    // A token belongs to WARPS / TOKENS warps; each of their lanes takes four neighbouring columns at a time.
    const int per_token = WARPS / TOKENS, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int token = warp / per_token, part = warp % per_token, step = 4 * 32 * per_token;
    const float* row = (const float*)x + (i64)token * k;
    const bool vector = (k & 3) == 0, mine = token < m;
    float sum = 0.0f, peak = 0.0f;
    if (mine)
        for (int i = (part * 32 + lane) * 4; i < k; i += step) {
            float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (vector) {
                *(float4*)v = __ldcg((const float4*)(row + i));
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) v[j] = i + j < k ? __ldcg(row + i + j) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sum += v[j] * v[j];
                peak = fmaxf(peak, fabsf(v[j]));
            }
        }
    sum = warp_sum(sum), peak = warp_max(peak);
    if (lane == 0) scratch[warp] = sum, scratch[WARPS + warp] = peak;
    __syncthreads();
    sum = 0.0f, peak = 0.0f;
    for (int i = 0; i < per_token; ++i) {
        sum += scratch[token * per_token + i];
        peak = fmaxf(peak, scratch[WARPS + token * per_token + i]);
    }
    const float norm = PROLOGUE == 1 ? __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)k) + eps)) : 1.0f;
    const TokenScale t = token_scale(__fmul_rn(peak, norm), clip, A_BITS);  // rounding keeps the order: the peak stays it
    if (mine) {
        if (part == 0 && lane == 0) scale_M[token] = t.scale;
        for (int i = (part * 32 + lane) * 4; i < padded; i += step) {
            float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (vector && i < k) {
                *(float4*)v = __ldcg((const float4*)(row + i));
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) v[j] = i + j < k ? __ldcg(row + i + j) : 0.0f;
            }
            char4 code;
            code.x = token_code(__fmul_rn(v[0], norm), t, A_BITS), code.y = token_code(__fmul_rn(v[1], norm), t, A_BITS);
            code.z = token_code(__fmul_rn(v[2], norm), t, A_BITS), code.w = token_code(__fmul_rn(v[3], norm), t, A_BITS);
            *(char4*)(code_MK + token * stride + i) = code;
        }
    }
#endif
}

// ---- the kernel

extern "C" __global__ void __launch_bounds__(WARPS * 32, TOKENS == 1 ? 2 : 1)
    linear(const u8* unit_TU, const float* scale_R, const float* bias_R, const void* x, const float* x_scale_M, float* out,
           int m, int k, int columns, int tiles, int units, float clip, float eps) {
    extern __shared__ __align__(128) u8 memory[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int first = (int)((i64)blockIdx.x * tiles / gridDim.x), last = (int)((i64)(blockIdx.x + 1) * tiles / gridDim.x);
    const int owned = last - first, padded = units * 128, stride = padded + 16;
    i8* const code_MK = (i8*)(memory + RING_BYTES);
    int* const sums = (int*)(code_MK + TOKENS * stride);  // [owned * 16][TOKENS]
    __shared__ u64 barriers[WARPS][STAGES];
    __shared__ float scratch[2 * WARPS], token_scales[TOKENS];

    const int begin = (int)((i64)warp * owned * units / WARPS), end = (int)((i64)(warp + 1) * owned * units / WARPS);
    Ring ring = {memory + warp * STAGES * STAGE_BYTES, barriers[warp],
                 unit_TU + ((i64)first * units + begin) * UNIT_BYTES, (end - begin) * UNIT_BYTES, 0};
    ring.start();
    pdl_launch();
    for (int i = threadIdx.x; i < owned * 16 * TOKENS; i += blockDim.x) sums[i] = 0;
    pdl_wait();
    load_activations(x, x_scale_M, m, k, padded, clip, eps, code_MK, stride, token_scales, scratch);
    __syncthreads();

    const i8* const my_codes = code_MK + (g < TOKENS ? g : 0) * stride + t * 32;
    const bool have_token = g < m;
    int sum[4] = {0, 0, 0, 0}, tile = begin / units, unit = begin % units;
    auto flush = [&]() {
        int* const row = sums + (tile * 16 + g) * TOKENS;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = 2 * t + (i & 1);
            if (token < m) atomicAdd(row + (i >> 1) * 8 * TOKENS + token, sum[i]);
            sum[i] = 0;
        }
    };
    const int stages = (end - begin + STAGE_UNITS - 1) / STAGE_UNITS;
    for (int stage = 0, at = begin; stage < stages; ++stage) {
        const u8* const data = ring.wait(stage);
#pragma unroll
        for (int i = 0; i < STAGE_UNITS; ++i, ++at) {
            if (at < end) {
                const uint4 code = *(const uint4*)(data + i * UNIT_BYTES + lane * 16);
                const int place = GROUP == 128 ? g : 2 * g + (t >> 1);
                const uint2 level = *(const uint2*)(data + i * UNIT_BYTES + CODE_BYTES + place * 8);
                uint4 b0 = {0, 0, 0, 0}, b1 = {0, 0, 0, 0};
                if (have_token) {
                    b0 = *(const uint4*)(my_codes + unit * 128);
                    b1 = *(const uint4*)(my_codes + unit * 128 + 16);
                }
                multiply(sum, code.x, code.y, level.x, level.y, b0.x, b0.y, b0.z, b0.w);
                multiply(sum, code.z, code.w, level.x, level.y, b1.x, b1.y, b1.z, b1.w);
                if (++unit == units) {
                    flush();
                    unit = 0, ++tile;
                }
            }
        }
        __syncwarp();
        ring.request();
    }
    if (unit != 0) flush();
    __syncthreads();

    const int rows = EPILOGUE == 2 ? 8 : 16;  // of a tile, in out
    for (int i = threadIdx.x; i < owned * rows * m; i += blockDim.x) {
        const int token = i / (owned * rows), local = i % (owned * rows), in_tile = local % rows;
        const int row = (local / rows) * 16 + in_tile, column = first * rows + local;
        if (column >= columns) continue;
        auto value = [&](int r) {
            const int global = first * 16 + r;
            const float y = __fmul_rn(__fmul_rn((float)sums[r * TOKENS + token], token_scales[token]), __ldg(scale_R + global));
            return bias_R ? __fadd_rn(y, __ldg(bias_R + global)) : y;
        };
        float* const to = out + (i64)token * columns + column;
#if EPILOGUE == 2
        const float gate = value(row), up = value(row + 8);
        *to = __fmul_rn(__fdiv_rn(gate, 1.0f + expf(-gate)), up);
#elif EPILOGUE == 1
        *to = __fadd_rn(__ldcg(to), value(row));
#else
        *to = value(row);
#endif
    }
}
