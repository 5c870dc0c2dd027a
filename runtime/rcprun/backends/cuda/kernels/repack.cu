// Codes and levels of one linear layer, from the file's row-major form (SPEC.md, section 8) to the units of linear.cu.
//
//   code_NB     u8  [n][code_bytes]          four codes a byte, lowest bits first
//   level_NG4   i8  [n][groups][4]
//   scale_N     f32 [n],  bias_N  f32 [n] or null
//   unit_TU     u8  [tiles][units][UNIT_BYTES], in the order of units.cuh; zero before; several layers may share it
//   blocks      of linear.cu, which the order depends on
//   scale_R     f32 [tiles * 16] zero before,  bias_R  f32 [tiles * 16] or null
//   Row r of the layer becomes row `base + r` of the tiles (side < 0), or, for gate (side 0) and up (side 1), row
//   r % 8 + 8 * side of tile r / 8.
//   One thread for each (row, unit, t).

#include "units.cuh"

// The four codes of a byte, each in a nibble of its own.
__device__ __forceinline__ u32 spread(u32 byte) {
    const u32 x = (byte | (byte << 4)) & 0x0f0fu;
    return (x | (x << 2)) & 0x3333u;
}

extern "C" __global__ void repack(const u8* code_NB, const i8* level_NG4, const float* scale_N, const float* bias_N, int n,
                                  int code_bytes, int groups, u8* unit_TU, float* scale_R, float* bias_R, int tiles, int units,
                                  int blocks, int base, int side) {
    const i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int t = (int)(index & 3), unit = (int)((index >> 2) % units);
    const i64 row = (index >> 2) / units;
    if (row >= n) return;
    const i64 to = side < 0 ? base + row : (row / 8) * 16 + row % 8 + 8 * side;
    const int in_tile = (int)(to & 15), g = in_tile & 7, upper = in_tile >> 3;
    const i64 stage = stage_place(to >> 4, unit / STAGE_UNITS, tiles, units / STAGE_UNITS, blocks);
    u8* const place = unit_TU + (stage * STAGE_UNITS + unit % STAGE_UNITS) * UNIT_BYTES;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 word = 0;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const int at = unit * 32 + t * 8 + half * 4 + pair * 2;
            const u32 first = at < code_bytes ? code_NB[row * code_bytes + at] : 0;
            const u32 second = at + 1 < code_bytes ? code_NB[row * code_bytes + at + 1] : 0;
            word |= (spread(first) | (spread(second) << 2)) << (16 * pair);
        }
        ((u32*)place)[(g * 4 + t) * 4 + half * 2 + upper] = word;
    }
    const int parts = 128 / GROUP;
    if (t < parts) {
        const int group = unit * parts + t;
        const u32 levels = group < groups ? ((const u32*)level_NG4)[row * groups + group] : 0;
        ((u32*)(place + CODE_BYTES))[(g * parts + t) * 2 + upper] = levels;
    }
    if (unit == 0 && t == 0) {
        scale_R[to] = scale_N[row];
        if (bias_R) bias_R[to] = bias_N ? bias_N[row] : 0.0f;
    }
}
