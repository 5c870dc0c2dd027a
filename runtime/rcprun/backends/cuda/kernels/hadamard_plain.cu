// What hadamard.cu leaves: transforms whose Sylvester part is below 8, by plain sums; and quantization of float rows.
#include "peak.cuh"

// had (SPEC.md, chapter 9) of vectors of b = m · sylvester channels, one thread an output.
//   x, y    float32 [M][copies][b], distinct; count = M · copies · b
//   factor  float32 [copies][b] or null   multiplied with x first, one rounding
//   p       int8 [m][m]                   P_m, or its transpose
// Grid count / block, rounded up.
extern "C" __global__ void hadamard_plain(const float* x, const float* factor, const i8* __restrict__ p, float norm,
                                          float* y, i64 count, int m, int sylvester, int copies) {
    pdl_launch();
    pdl_wait();
    const i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    const int width = m * sylvester, channel = (int)(index % width), column = channel % sylvester;
    const float* const from = x + (index - channel);
    if (factor) factor += index / width % copies * width;
    float sum = 0.0f;
    for (int a = 0; a < m; ++a) {
        float inner = 0.0f;
        for (int c = 0; c < sylvester; ++c) {
            const int i = a * sylvester + c;
            const float v = factor ? from[i] * factor[i] : from[i];
            inner += __popc(column & c) & 1 ? -v : v;
        }
        sum += p[channel / sylvester * m + a] < 0 ? -inner : inner;
    }
    y[index] = norm * sum;
}

// SPEC.md, "Activations": one block (a multiple of 32 threads) a token.
//   x       float32 [M][n]
//   factor  float32 [n] or null   multiplied with x first, one rounding
//   codes   int8 [M][stride], the first n bytes of a row are written; scale float32 [M]
extern "C" __global__ void quantize(const float* x, const float* factor, i8* codes, float* scale, int n, int stride,
                                    float clip, int bits) {
    __shared__ u32 scratch[32];
    pdl_launch();
    pdl_wait();
    const float* const from = x + (i64)blockIdx.x * n;
    i8* const to = codes + (i64)blockIdx.x * stride;
    u32 peak = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        peak = max(peak, magnitude(factor ? from[i] * factor[i] : from[i]));
    }
    const TokenScale token = token_scale(__uint_as_float(block_peak(peak, scratch)), clip, bits);
    if (threadIdx.x == 0) scale[blockIdx.x] = token.scale;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        to[i] = token_code(factor ? from[i] * factor[i] : from[i], token, bits);
    }
}
