// Units of a linear layer to plain int8, for products with many tokens by cuBLAS.
//
//   unit_TU     u8 [tiles][units][UNIT_BYTES], see units.cuh
//   integer_RK  i8 [tiles * 16][units * 128]
//   One thread for each lane of each unit.

#include "units.cuh"

__device__ __forceinline__ uint4 sixteen(u32 word, u32 levels) {
    const u32 even = word & 0x33333333u, odd = (word >> 2) & 0x33333333u;
    return make_uint4(look_up(levels, even), look_up(levels, odd), look_up(levels, upper_half(even)),
                      look_up(levels, upper_half(odd)));
}

extern "C" __global__ void expand(const u8* unit_TU, i8* integer_RK, int tiles, int units) {
    const i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = (int)(index & 31), g = lane >> 2, t = lane & 3;
    const i64 unit = index >> 5;
    pdl_wait();  // the buffer is another layer's until then
    if (unit >= (i64)tiles * units) return;
    const u8* const from = unit_TU + unit * UNIT_BYTES;
    const uint4 code = *(const uint4*)(from + lane * 16);
    const uint2 level = *(const uint2*)(from + levels_of_lane(lane));
    const i64 columns = (i64)units * 128;
    i8* const low = integer_RK + ((unit / units) * 16 + g) * columns + (unit % units) * 128 + t * 32;
    i8* const high = low + 8 * columns;
    *(uint4*)low = sixteen(code.x, level.x), *(uint4*)(low + 16) = sixteen(code.z, level.x);
    *(uint4*)high = sixteen(code.y, level.y), *(uint4*)(high + 16) = sixteen(code.w, level.y);
}
