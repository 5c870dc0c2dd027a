// What one warp does to one head of a new token: RMS norm, RoPE, Hadamard, and quantization for the cache (SPEC.md,
// "Attention", steps 2 to 5, and "KV cache"). D = HEAD_DIM is even.
//
// The including file defines HEAD_DIM, BITS (4 or 8), PALEY (m of SPEC.md, "Transforms"; 0: no Hadamard) and HADAMARD
// (order of a block of the transform; it divides D).
#pragma once
#include "common.cuh"

constexpr int HALF_DIM = HEAD_DIM / 2;
constexpr int PAIRS = (HALF_DIM + 31) / 32;  // of channels i, i + D / 2 that a lane holds
constexpr int HALF_WORD = 16 / BITS;         // codes in 16 bits
constexpr int HALF_WORDS = (HEAD_DIM + HALF_WORD - 1) / HALF_WORD;
constexpr int STORED = HALF_WORDS * HALF_WORD;
constexpr int SCRATCH = PALEY > 1 ? STORED : 0;  // floats that store() needs besides x
constexpr bool BY_LANES = PALEY == 1 && HADAMARD == HEAD_DIM && HALF_DIM % 32 == 0;  // Hadamard without shared memory

// x: D floats of this warp, in shared memory; scratch: SCRATCH. Returns which of the two has the result.
__device__ __forceinline__ float* hadamard(float* x, float* scratch, const i8* paley) {
#if PALEY > 0
    constexpr int SYLVESTER = HADAMARD / PALEY;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int stride = 1; stride < SYLVESTER; stride *= 2) {
#pragma unroll
        for (int pair = lane; pair < HALF_DIM; pair += 32) {
            const int a = pair / stride * 2 * stride + pair % stride, b = a + stride;
            const float first = x[a], second = x[b];
            x[a] = first + second;
            x[b] = first - second;
        }
        __syncwarp();
    }
#if PALEY > 1
    for (int channel = lane; channel < HEAD_DIM; channel += 32) {
        const int block = channel / HADAMARD * HADAMARD, row = channel % HADAMARD / SYLVESTER;
        const float* column = x + block + channel % SYLVESTER;
        float sum = 0.0f;
        for (int k = 0; k < PALEY; k++) sum += (float)paley[row * PALEY + k] * column[k * SYLVESTER];
        scratch[channel] = sum;
    }
    __syncwarp();
    return scratch;
#endif
#endif
    return x;
}

// A head in the registers of a warp: channels i and i + D / 2 with i = lane + 32k.
struct Head {
    float first[PAIRS], second[PAIRS], c[PAIRS], s[PAIRS];

    __device__ __forceinline__ void load(const float* from) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const int i = lane + 32 * k;
            first[k] = i < HALF_DIM ? load_now(from + i) : 0.0f;
            second[k] = i < HALF_DIM ? load_now(from + i + HALF_DIM) : 0.0f;
        }
    }

    // cosine, sine: [positions][D / 2]. NOW: at once, but by way of the first-level cache otherwise, for many tokens.
    template <bool NOW>
    __device__ __forceinline__ void load_angles(const float* cosine, const float* sine, int position) {
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const i64 i = (i64)position * HALF_DIM + min((int)(threadIdx.x & 31) + 32 * k, HALF_DIM - 1);
            c[k] = NOW ? load_now(cosine + i) : cosine[i];
            s[k] = NOW ? load_now(sine + i) : sine[i];
        }
    }

    __device__ __forceinline__ void normalize(const float* gain, float eps) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < PAIRS; k++) sum += first[k] * first[k] + second[k] * second[k];
        const float mean = __fdiv_rn(warp_sum(sum), (float)HEAD_DIM);
        const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + eps));
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const int i = min((int)(threadIdx.x & 31) + 32 * k, HALF_DIM - 1);
            first[k] = first[k] * inverse * gain[i];
            second[k] = second[k] * inverse * gain[i + HALF_DIM];
        }
    }

    __device__ __forceinline__ void rotate() {
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const float a = first[k], b = second[k];
            first[k] = a * c[k] - b * s[k];
            second[k] = b * c[k] + a * s[k];
        }
    }

    // To x, STORED floats of shared memory; transformed: times the Hadamard matrix and norm, where there is one.
    __device__ __forceinline__ void store(float* x, float* scratch, bool transformed, const i8* paley, float norm) {
        const int lane = threadIdx.x & 31;
        if (BY_LANES && transformed) hadamard_by_lanes(norm);
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const int i = lane + 32 * k;
            if (i < HALF_DIM) {
                x[i] = first[k];
                x[i + HALF_DIM] = second[k];
            }
        }
        __syncwarp();
        if (PALEY > 0 && !BY_LANES && transformed) {
            const float* y = hadamard(x, scratch, paley);
            for (int i = lane; i < HEAD_DIM; i += 32) x[i] = y[i] * norm;
            __syncwarp();
        }
    }

  private:
    // The same sums and differences, in the same order of strides.
    __device__ __forceinline__ void hadamard_by_lanes(float norm) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int stride = 1; stride < 32; stride *= 2) {
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                const float a = __shfl_xor_sync(FULL_MASK, first[k], stride);
                const float b = __shfl_xor_sync(FULL_MASK, second[k], stride);
                first[k] = lane & stride ? a - first[k] : first[k] + a;
                second[k] = lane & stride ? b - second[k] : second[k] + b;
            }
        }
#pragma unroll
        for (int stride = 1; stride < PAIRS; stride *= 2)
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                if (k & stride) continue;
                butterfly(first[k], first[k + stride]);
                butterfly(second[k], second[k + stride]);
            }
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            butterfly(first[k], second[k]);
            first[k] *= norm;
            second[k] *= norm;
        }
    }
    static __device__ __forceinline__ void butterfly(float& a, float& b) {
        const float first = a, second = b;
        a = first + second;
        b = first - second;
    }
};

// x within what a half can hold; NaN stays.
__device__ __forceinline__ float clamp_half(float x) {
    return -max_or_nan(-max_or_nan(x, -65504.0f), -65504.0f);
}

// How a head's codes follow from its largest and smallest channel. bits: low (f16, lower half), step (f16, upper half).
struct HeadScale {
    static constexpr float TOP = (1 << BITS) - 1;
    float low, inverse;
    u32 bits;

    __device__ __forceinline__ HeadScale(float highest, float lowest, float clip) {
        const float high = clamp_half(clip * highest);
        const u16 low_half = half_from_float(clamp_half(clip * lowest));
        low = float_from_half(low_half);
        const float rounded = float_from_half(half_from_float(clamp_half(__fdiv_rn(high - low, TOP))));
        const float step = max_or_nan(rounded, 6.103515625e-05f);  // 2^-14
        inverse = __fdiv_rn(1.0f, step);
        bits = low_half | (u32)half_from_float(step) << 16;
    }
};

// The codes of x, STORED floats in shared memory of which D count: write(half word, its codes), lowest bits first.
// Returns the bits of their scale.
template <typename Write>
__device__ __forceinline__ u32 quantize_head(const float* x, float clip, Write write) {
    struct alignas(4 * HALF_WORD) Floats {
        float of[HALF_WORD];
    };
    constexpr int OWN = (HALF_WORDS + 31) / 32;
    const int lane = threadIdx.x & 31;
    Floats own[OWN];
    float high = -__int_as_float(0x7f800000), minus_low = high;
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int index = lane + 32 * n;
        if (index < HALF_WORDS) own[n] = reinterpret_cast<const Floats*>(x)[index];
#pragma unroll
        for (int s = 0; s < HALF_WORD; s++) {
            if (index * HALF_WORD + s >= HEAD_DIM) continue;
            high = max_or_nan(high, own[n].of[s]);
            minus_low = max_or_nan(minus_low, -own[n].of[s]);
        }
    }
    const HeadScale scale(warp_max(high), -warp_max(minus_low), clip);
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int index = lane + 32 * n;
        u32 codes = 0;
#pragma unroll
        for (int s = 0; s < HALF_WORD; s++) {
            const float code = index * HALF_WORD + s < HEAD_DIM ? rintf((own[n].of[s] - scale.low) * scale.inverse) : 0.0f;
            codes |= (u32)fminf(fmaxf(code, 0.0f), HeadScale::TOP) << (BITS * s);
        }
        if (index < HALF_WORDS) write(index, (u16)codes);
    }
    return scale.bits;
}
