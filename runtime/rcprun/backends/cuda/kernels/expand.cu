// Units of a linear layer to plain int8, for products with many tokens by cuBLAS.
//
//   unit_TU     u8 [tiles][units][UNIT_BYTES], in the order of units.cuh
//   integer_RK  i8 [tiles * 16][units * 128], written
//   blocks      of linear.cu, which the order depends on
//
// Any grid of blocks of 32 * WARPS threads: few of them, with few registers, find room beside the blocks of another kernel.
// A warp takes one unit after the other, while the next SLOTS - 1 of its own are on their way to shared memory.

#include "units.cuh"

constexpr int WARPS = 4, SLOTS = 8;
constexpr int CHUNKS = UNIT_BYTES / 16;

__device__ __forceinline__ uint4 sixteen(u32 word, u32 levels) {
    const u32 even = word & 0x33333333u, odd = (word >> 2) & 0x33333333u;
    return make_uint4(look_up(levels, even), look_up(levels, odd), look_up(levels, upper_half(even)),
                      look_up(levels, upper_half(odd)));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 16)
    expand(const u8* unit_TU, i8* integer_RK, int tiles, int units, int blocks) {
    __shared__ __align__(16) u8 ring[WARPS][SLOTS][UNIT_BYTES];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int count = tiles * units, step = gridDim.x * WARPS, start = blockIdx.x * WARPS + warp;
    const u32 own = shared_address(ring[warp][0] + lane * 16);

    int asked = start, to_slot = 0;
    auto request = [&] {  // an empty group where no unit is left: groups are counted
        if (asked < count) {
            const int unit = asked % units;
            const i64 stage = stage_place(asked / units, unit / STAGE_UNITS, tiles, units / STAGE_UNITS, blocks);
            const u8* const from = unit_TU + (stage * STAGE_UNITS + unit % STAGE_UNITS) * UNIT_BYTES + lane * 16;
            copy_async(own + to_slot * UNIT_BYTES, from);
            if (lane < CHUNKS - 32) copy_async(own + to_slot * UNIT_BYTES + CODE_BYTES, from + CODE_BYTES);
        }
        commit_copies();
        asked += step;
        to_slot = (to_slot + 1) % SLOTS;
    };
    for (int i = 0; i < SLOTS - 1; ++i) request();

    // A lane holds 32 columns of its rows. Neighbours swap halves, so that each store of a pair fills 32 bytes in a row:
    // of 64 columns in quarters, the lane with even t gets 0 and 2, the other 1 and 3.
    const bool odd = lane & 1;
    const i64 columns = (i64)units * 128;
    i8* const low = integer_RK + g * columns + (t >> 1) * 64 + odd * 16;
    const int tile_step = step / units, unit_step = step % units;
    int tile = start / units, unit = start % units, slot = 0;
#pragma unroll 1
    for (int i = start; i < count; i += step) {
        wait_for_copies<SLOTS - 2>();
        __syncwarp();  // all lanes' copies are there, and the slot that is asked for next has been read
        request();
        const u8* const here = ring[warp][slot];
        const uint4 code = *(const uint4*)(here + lane * 16);
        const uint2 level = *(const uint2*)(here + levels_of_lane(lane));
        const u32 swapped_low = __shfl_xor_sync(FULL_MASK, odd ? code.x : code.z, 1);
        const u32 swapped_high = __shfl_xor_sync(FULL_MASK, odd ? code.y : code.w, 1);
        i8* const to = low + tile * 16 * columns + unit * 128;
        i8* const to_high = to + 8 * columns;
        *(uint4*)to = sixteen(odd ? swapped_low : code.x, level.x);
        *(uint4*)(to + 32) = sixteen(odd ? code.z : swapped_low, level.x);
        *(uint4*)to_high = sixteen(odd ? swapped_high : code.y, level.y);
        *(uint4*)(to_high + 32) = sixteen(odd ? code.w : swapped_high, level.y);
        slot = (slot + 1) % SLOTS;
        tile += tile_step;
        unit += unit_step;
        if (unit >= units) ++tile, unit -= units;
    }
}
