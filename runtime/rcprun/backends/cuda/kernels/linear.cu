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
//   Limits: 1 <= m <= TOKENS (1 or 8); units even; k <= units * 128; k a multiple of 4 for PROLOGUE 1 and 2 with vector loads, else
//   slower ones; int32 sums, so k < 2^31 / 127^2.
//
// Every block owns whole tiles, all columns of them, so that sums never leave it. The tiles' units are one contiguous
// stream, cut evenly among the warps; a warp's part flows through its own ring in shared memory (bulk copies on sm_90,
// cp.async before), filled as far as it goes before the block waits for earlier kernels. A lane (g = lane / 4,
// t = lane % 4) holds the codes of rows g and g + 8 for columns [32 t, 32 t + 32) of a unit; they become int8 levels
// by byte permutation and are the A operand of mma.m16n8k32, whose order of columns is free as long as B agrees. B is
// 32 contiguous bytes of the token n = lane / 4. Warps add their sums (integers: any order) in shared memory.

#include "common.cuh"
#include "units.cuh"

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
#define TRIGGER 5  // stages a warp has left when the next kernel may start: earlier, its weights delay this one's
#define STAGE_UNITS 2
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)
#define RING_BYTES (WARPS * STAGES * STAGE_BYTES)

// ---- shared memory by its 32-bit address, which saves the inner loop the conversions from pointers

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ uint4 load4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ uint2 load2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

// ---- a warp's ring

// The stream of one warp, a stage at a time, through STAGES slots at `buffer` (each with a barrier at `barriers`).
struct Ring {
    u32 buffer, barriers;
    const u8* from;
    int left;  // stages not asked for yet; on sm_90, in lane 0 only: it asks for all

    // Ask for the next stage, into a slot whose bytes are used up.
    __device__ __forceinline__ void request(int slot) {
#if RCP_HOPPER
        if (left > 0) {
            asm volatile(
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %2;\n"
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%1], [%3], %2, [%0];" ::"r"(
                    barriers + slot * 8),
                "r"(buffer + slot * STAGE_BYTES), "n"(STAGE_BYTES), "l"(from)
                : "memory");
        }
#else
        if (left > 0)
            for (int i = (threadIdx.x & 31) * 16; i < STAGE_BYTES; i += 512)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(buffer + slot * STAGE_BYTES + i), "l"(from + i)
                             : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
        --left;
        from += STAGE_BYTES;
    }
    __device__ __forceinline__ void start() {
#if RCP_HOPPER
        if ((threadIdx.x & 31) == 0) {
            for (int i = 0; i < STAGES; ++i)
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        } else {
            left = 0;
        }
        __syncwarp();
#endif
#pragma unroll
        for (int i = 0; i < STAGES; ++i) request(i);
    }
    // Wait until the bytes of a slot are there for every lane. Slots come round in order; parity: of the round.
    __device__ __forceinline__ void wait(int slot, int parity) const {
#if RCP_HOPPER
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(barriers + slot * 8),
            "r"(parity)
            : "memory");
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        __syncwarp();
#endif
    }
};

// ---- products

__device__ __forceinline__ void mma(int (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 columns (two products' worth) of rows g and g + 8: 16 codes a word, even ones at bits 4i, odd ones at 4i + 2.
__device__ __forceinline__ void multiply(int (&sum)[4], u32 low, u32 high, uint2 level, u32 b0, u32 b1, u32 b2, u32 b3) {
    const u32 mask = 0x33333333u;
    const u32 even_low = low & mask, odd_low = (low >> 2) & mask, even_high = high & mask, odd_high = (high >> 2) & mask;
    mma(sum, look_up(level.x, even_low), look_up(level.y, even_high), look_up(level.x, odd_low), look_up(level.y, odd_high),
        b0, b1);
    mma(sum, look_up(level.x, upper_half(even_low)), look_up(level.y, upper_half(even_high)),
        look_up(level.x, upper_half(odd_low)), look_up(level.y, upper_half(odd_high)), b2, b3);
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
    // A token belongs to WARPS / TOKENS warps; each of their lanes takes four neighbouring columns at a time, and keeps
    // the first HELD such vectors in registers: they are read once.
    constexpr int PER_TOKEN = WARPS / TOKENS, HELD = 4, STEP = 4 * 32 * PER_TOKEN;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, token = warp / PER_TOKEN, part = warp % PER_TOKEN;
    const float* const row = (const float*)x + (i64)token * k;
    const int first = token < m ? (part * 32 + lane) * 4 : padded;
    auto load = [&](int i) {
        float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
        if ((k & 3) == 0) {
            if (i < k) v = __ldcg((const float4*)(row + i));
        } else {
            if (i < k) v.x = __ldcg(row + i);
            if (i + 1 < k) v.y = __ldcg(row + i + 1);
            if (i + 2 < k) v.z = __ldcg(row + i + 2);
            if (i + 3 < k) v.w = __ldcg(row + i + 3);
        }
        return v;
    };
    float sum = 0.0f, peak = 0.0f;
    auto measure = [&](float4 v) {
        sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        peak = max_or_nan(peak, max_or_nan(max_or_nan(fabsf(v.x), fabsf(v.y)), max_or_nan(fabsf(v.z), fabsf(v.w))));
    };
    float4 held[HELD];
#pragma unroll
    for (int j = 0; j < HELD; ++j) held[j] = load(first + j * STEP);
#pragma unroll
    for (int j = 0; j < HELD; ++j) measure(held[j]);
    for (int i = first + HELD * STEP; i < k; i += STEP) measure(load(i));
    sum = warp_sum(sum), peak = warp_max(peak);
    if (lane == 0) scratch[warp] = sum, scratch[WARPS + warp] = peak;
    __syncthreads();
    sum = 0.0f, peak = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_TOKEN; ++i) {
        sum += scratch[token * PER_TOKEN + i];
        peak = max_or_nan(peak, scratch[WARPS + token * PER_TOKEN + i]);
    }
    const float norm = PROLOGUE == 1 ? __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)k) + eps)) : 1.0f;
    const TokenScale t = token_scale(__fmul_rn(peak, norm), clip, A_BITS);  // rounding keeps the order: the peak stays it
    if (token < m && part == 0 && lane == 0) scale_M[token] = t.scale;
    auto store = [&](int i, float4 v) {
        char4 code;
        code.x = token_code(__fmul_rn(v.x, norm), t, A_BITS), code.y = token_code(__fmul_rn(v.y, norm), t, A_BITS);
        code.z = token_code(__fmul_rn(v.z, norm), t, A_BITS), code.w = token_code(__fmul_rn(v.w, norm), t, A_BITS);
        if (i < padded) *(char4*)(code_MK + token * stride + i) = code;
    };
#pragma unroll
    for (int j = 0; j < HELD; ++j) store(first + j * STEP, held[j]);
    for (int i = first + HELD * STEP; i < padded; i += STEP) store(i, load(i));
#endif
}

// ---- the kernel

#ifdef TRACE
__device__ u64 trace_data[1 << 20];
__device__ u32 trace_count;
__device__ __forceinline__ u64 now() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
#define MARK(i) if (threadIdx.x == 0) trace_row[i] = now()
#else
#define MARK(i)
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, TOKENS == 1 ? 2 : 1)
    linear(const u8* unit_TU, const float* scale_R, const float* bias_R, const void* x, const float* x_scale_M, float* out,
           int m, int k, int columns, int tiles, int units, float clip, float eps) {
    extern __shared__ __align__(128) u8 memory[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int first = (int)((i64)blockIdx.x * tiles / gridDim.x), last = (int)((i64)(blockIdx.x + 1) * tiles / gridDim.x);
    const int owned = last - first, padded = units * 128, stride = padded + 16;
    i8* const code_MK = (i8*)(memory + RING_BYTES);
    int* const sums = (int*)(code_MK + TOKENS * stride);  // [owned * 16][TOKENS]
    float* const scales = (float*)(sums + owned * 16 * TOKENS);  // [owned * 16], then biases
    __shared__ u64 barriers[WARPS][STAGES];
    __shared__ float scratch[2 * WARPS], token_scales[TOKENS];
    __shared__ __align__(16) u8 zeros[32];

#ifdef TRACE
    u64* trace_row = trace_data;
    if (threadIdx.x == 0) {
        trace_row += 8 * atomicAdd(&trace_count, 1u);
        u32 sm;
        asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
        trace_row[7] = sm;
    }
#endif
    MARK(0);
    const int stages = units / STAGE_UNITS;  // of a tile
    const int begin = warp * owned * stages / WARPS, end = (warp + 1) * owned * stages / WARPS;
    Ring ring = {shared_address(memory) + warp * STAGES * STAGE_BYTES, shared_address(barriers[warp]),
                 unit_TU + ((i64)first * stages + begin) * STAGE_BYTES, end - begin};
    ring.start();
    if (end - begin <= TRIGGER) pdl_launch();
    if (threadIdx.x < 8) ((u32*)zeros)[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < owned * 16 * TOKENS; i += blockDim.x) sums[i] = 0;
    for (int i = threadIdx.x; i < owned * 16; i += blockDim.x) {
        scales[i] = __ldg(scale_R + first * 16 + i);
        if (bias_R) scales[owned * 16 + i] = __ldg(bias_R + first * 16 + i);
    }
    MARK(1);
    pdl_wait();
    MARK(2);
    load_activations(x, x_scale_M, m, k, padded, clip, eps, code_MK, stride, token_scales, scratch);
    __syncthreads();
    MARK(3);

    // Lanes of a token that is not there read zeros, again and again.
    const u32 my_codes = g < m ? shared_address(code_MK) + g * stride + t * 32 : shared_address(zeros);
    const u32 step = g < m ? 128 : 0;
    const u32 my_code = ring.buffer + lane * 16;
    const u32 my_level = ring.buffer + levels_of_lane(lane);
    int even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0}, tile = begin / stages, in_tile = stages - begin % stages;
    u32 codes = my_codes + (stages - in_tile) * STAGE_UNITS * step;
    auto flush = [&]() {
        int* const row = sums + (tile * 16 + g) * TOKENS;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = 2 * t + (i & 1);
            if (token < m) atomicAdd(row + (i >> 1) * 8 * TOKENS + token, even[i] + odd[i]);
            even[i] = odd[i] = 0;
        }
    };
    for (int left = end - begin, parity = 0; left > 0; parity ^= 1) {
#pragma unroll
        for (int slot = 0; slot < STAGES; ++slot) {
            if (left > 0) {
                ring.wait(slot, parity);
                const u32 next = codes + step;
                const uint4 code0 = load4(my_code + slot * STAGE_BYTES);
                const uint2 level0 = load2(my_level + slot * STAGE_BYTES);
                const uint4 b0 = load4(codes), b1 = load4(codes + 16);
                const uint4 code1 = load4(my_code + slot * STAGE_BYTES + UNIT_BYTES);
                const uint2 level1 = load2(my_level + slot * STAGE_BYTES + UNIT_BYTES);
                const uint4 b2 = load4(next), b3 = load4(next + 16);
                codes = next + step;
                multiply(even, code0.x, code0.y, level0, b0.x, b0.y, b0.z, b0.w);
                multiply(odd, code1.x, code1.y, level1, b2.x, b2.y, b2.z, b2.w);
                multiply(even, code0.z, code0.w, level0, b1.x, b1.y, b1.z, b1.w);
                multiply(odd, code1.z, code1.w, level1, b3.x, b3.y, b3.z, b3.w);
                __syncwarp();
                ring.request(slot);
                if (--in_tile == 0) {
                    flush();
                    in_tile = stages, ++tile, codes = my_codes;
                }
                if (--left == TRIGGER) pdl_launch();
            }
        }
    }
    if (in_tile != stages) flush();
    MARK(4);
    __syncthreads();
    MARK(5);

    const int rows = EPILOGUE == 2 ? 8 : 16;  // of a tile, in out
    for (int i = threadIdx.x; i < owned * rows * m; i += blockDim.x) {
        const int token = i / (owned * rows), local = i % (owned * rows);
        const int row = (local / rows) * 16 + local % rows, column = first * rows + local;
        if (column >= columns) continue;
        auto value = [&](int r) {
            const float y = __fmul_rn(__fmul_rn((float)sums[r * TOKENS + token], token_scales[token]), scales[r]);
            return bias_R ? __fadd_rn(y, scales[owned * 16 + r]) : y;
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
    MARK(6);
}
