// One token of each of M sequences, each at its own position: attention while decoding. keys, values, scales, out and
// their limits: attention.cuh.
//   qkv             f32 [M][(H + 2G) * D]: heads of q, of k, of v as the linear layer gives them, where FUSED; the
//                   kernel does then what rope.cu does, and writes key and value of each token into the cache. No two
//                   rows of one slot. Otherwise [M][H * D], the queries; all of the cache is there already.
//   q_gain, k_gain, cosine, sine, paley, eps, norm, key_clip, value_clip   as in rope.cu where FUSED, unused otherwise
//   position, slot  i32 [M]
//   partial         Part [teams][M][G * chunks][min(R, COLUMNS) * P / 4]; all bits set before and after
//   arrived         u32 [M][G * chunks][CLUSTER]; zeros before, zeros after
// window: visible tokens, the query's own among them. scale: log2(e) / sqrt(D).
//
// Grid (CLUSTER, G * chunks, teams * M), 32 * WARPS threads; chunks = ceil(R / COLUMNS) share the heads of a KV head, teams
// the tokens. A team is a cluster of blocks, of which no more are used than it takes for no warp to have two tiles. The
// grid knows no position: blocks beyond what the visible tokens need leave at once; teams that few tokens do without come
// last, where they keep no other from beginning early. Blocks of a team send each other their sums, teams add up through
// global memory: the last one to begin, which knows that all others run, waits until their sums are there, without a
// fence, and adds up all, in order.
//
// Where FUSED, the first tiles are fetched before the kernel before has ended: an earlier step wrote them, but for the
// new token. The same holds for position and slot: they are no kernel's of this step.
//
// A warp copies tiles to a ring of STAGES in shared memory, STAGES * WARPS * (16 or 32, Columns<1>::TOKENS) * (P * BITS
// / 4 + 8) bytes for all. The new token's key and value are put into the ring by the warp that has its tile, and are
// read from nowhere else.
//
// Defines: HEAD_DIM, BITS (4 or 8), WARPS, STAGES (2 or more), EARLY (tiles that a block asks for before it waits for the
// kernel before), CLUSTER (1, 2, 4 or 8; 1 before sm_90), FUSED (0 or 1), PALEY and HADAMARD (as in rope.cu; 0 and any
// where not FUSED).
#ifndef HEAD_DIM
#error "HEAD_DIM: channels of a head"
#endif
#ifndef BITS
#error "BITS: 4 or 8, of a code"
#endif
#ifndef WARPS
#error "WARPS: of a block"
#endif
#ifndef STAGES
#error "STAGES: tiles that a warp has in shared memory"
#endif
#ifndef EARLY
#error "EARLY: tiles that a block asks for before it waits for the kernel before"
#endif
#ifndef CLUSTER
#error "CLUSTER: blocks of a team"
#endif
#ifndef FUSED
#error "FUSED: 1 where queries, keys and values come from the linear layer, 0 where rope.cu has been"
#endif
#ifndef PALEY
#error "PALEY: order of the Paley factor of the Hadamard transform, or 0"
#endif
#ifndef HADAMARD
#error "HADAMARD: order of a block of the Hadamard transform"
#endif
#include "attention.cuh"
#include "rope.cuh"

#if CLUSTER > 1 && !RCP_HOPPER
#error "CLUSTER: 1 before sm_90"
#endif

using Decode = Columns<1>;
constexpr int COLUMNS = Decode::COUNT, TOKENS = Decode::TOKENS, BLOCKS_OF_16 = Decode::BLOCKS_OF_16;
constexpr int ROW = PADDED + 4;  // floats: no bank conflicts between columns
constexpr int QUADS = PADDED / 4;
constexpr int TEAMS_AT_ONCE = 4;  // whose sums are asked for together
constexpr int ENOUGH = CLUSTER > 1 ? 3 : 1;  // tiles of a warp, at most, that are sooner done than teams' sums
constexpr int KEY_BYTES = TOKENS * ROW_WORDS * 4;  // of a tile's keys, and of its values
constexpr int PAIR_BYTES = ROW_WORDS * 8;               // of a pair of values
constexpr int JOBS = COLUMNS + (FUSED ? 2 : 0);  // queries, key, value
constexpr int OWN = (4 * STEPS + 31) / 32;       // fours of a query's channels that a lane splits

// A tile of the sequence, as it lies in the cache.
struct alignas(16) Tile {
    u32 keys[TOKENS * ROW_WORDS], values[TOKENS * ROW_WORDS];
    uint2 scales[TOKENS];
};
struct alignas(4 * UNIT) Unit {
    float x[UNIT];
};
// Of four channels.
struct alignas(16) Part {
    float4 sum;
    float peak, total;
};
constexpr int PART_BYTES = 24;      // without what aligns it
constexpr u32 EMPTY = 0xffffffffu;  // in a team's part: not there yet. Arithmetic gives no NaN but 0x7fffffff.

// In shared memory, 32 bytes in 128 of a pair of values change places, so that lanes that read four pairs at a time read
// different banks. at: in the values of a tile, in bytes.
__device__ __forceinline__ u32 value_place(u32 at) {
    return VECTOR == 4 ? at ^ at / PAIR_BYTES % 4 * 32 : at;
}

// The mma operand of a query in shared memory: what lanes of its column hold of each step. Sets its peak and sum.
__device__ __forceinline__ void split_query(uint2 (&fragments)[STEPS][32], const float* x, int column, float& peak, float& sum) {
    const int lane = threadIdx.x & 31, j = lane & 3;
    float own[OWN][4];
    peak = sum = 0.0f;
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int step = lane / 4 + 8 * n;
        const int channel = word_index(step / (UNIT / 2), j, 4) * 2 * UNIT + step % (UNIT / 2) * 2;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int i = channel + c % 2 + c / 2 * UNIT;
            own[n][c] = step < STEPS && i < HEAD_DIM ? x[i] : 0.0f;
            peak = max_or_nan(peak, fabsf(own[n][c]));
            sum += own[n][c];
        }
    }
    peak = warp_max(peak);
    const float up = scaled_up(peak);
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int step = lane / 4 + 8 * n;
        if (step >= STEPS) break;
        u32 both[4];  // hi and lo
#pragma unroll
        for (int c = 0; c < 4; c++) both[c] = split(own[n][c] * (c % 2 ? up * (ODD_CODES / CODES) : up));
        fragments[step][8 * column + j] = {__byte_perm(both[0], both[2], 0x5410), __byte_perm(both[1], both[3], 0x5410)};
        fragments[step][8 * column + 4 + j] = {__byte_perm(both[0], both[2], 0x7632), __byte_perm(both[1], both[3], 0x7632)};
    }
    sum = warp_sum(sum);
}

// Tile number `tile` of keys, values or scales to shared memory. from: the lane's part of tile 0.
template <int BYTES, bool VALUES>
__device__ __forceinline__ void copy_by_warp(u32 to, const u8* from, int tile) {
    const u32 mine = (threadIdx.x & 31) * 16, place = VALUES ? value_place(mine) : mine;
    from += (i64)tile * BYTES;
#pragma unroll
    for (int i = 0; i < BYTES; i += 32 * 16) {
        const bool same = !VALUES || 32 * 16 % (4 * PAIR_BYTES) == 0;  // place for all i
        if (i + 32 * 16 <= BYTES || i + mine < BYTES) copy_async(to + (same ? i + place : value_place(i + mine)), from + i);
    }
}

// to.peak is the largest of all parts' peaks already.
__device__ __forceinline__ void add_part(Part& to, const float4& x, float peak, float total) {
    const float f = exp2_approx(peak - to.peak);
    to.sum = {fmaf(f, x.x, to.sum.x), fmaf(f, x.y, to.sum.y), fmaf(f, x.z, to.sum.z), fmaf(f, x.w, to.sum.w)};
    to.total = fmaf(f, total, to.total);
}

__device__ __forceinline__ bool is_there(float x) { return __float_as_uint(x) != EMPTY; }

// The parts of `count` teams, when all are there; their places are empty afterwards. All are asked for together, and again
// until they have come.
__device__ __forceinline__ void take_parts(Part (&of)[TEAMS_AT_ONCE], Part* from, int stride, int count) {
    for (bool all = false; !all;) {
#pragma unroll
        for (int t = 0; t < TEAMS_AT_ONCE; t++) {
            const Part& part = from[(i64)min(t, count - 1) * stride];
            of[t].sum = load_now(&part.sum);
            const float2 scale = load_now(reinterpret_cast<const float2*>(&part.peak));
            of[t].peak = scale.x, of[t].total = scale.y;
        }
        all = true;
#pragma unroll
        for (int t = 0; t < TEAMS_AT_ONCE; t++) {
            const float4& x = of[t].sum;
            all = all && is_there(x.x) && is_there(x.y) && is_there(x.z) && is_there(x.w);
            all = all && is_there(of[t].peak) && is_there(of[t].total);
        }
    }
    const float empty = __uint_as_float(EMPTY);
    for (int t = 0; t < count; t++) {
        store_now(&from[(i64)t * stride].sum, float4{empty, empty, empty, empty});
        store_now(reinterpret_cast<float2*>(&from[(i64)t * stride].peak), float2{empty, empty});
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, PADDED <= 128 ? 2 : 1)
    decode_attention(const float* qkv, const float* q_gain, const float* k_gain, const float* cosine, const float* sine,
                     const i8* paley, u32* keys, u32* values, uint2* scales, const i32* position, const i32* slot,
                     float* out, Part* partial, u32* arrived, int group, int kv_heads, int capacity, int window,
                     int teams, float scale, float eps, float norm, float key_clip, float value_clip) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(16) float vectors[JOBS][PADDED];
    __shared__ __align__(16) float scratch[WARPS][SCRATCH > 0 ? SCRATCH : 1];
    __shared__ __align__(16) uint2 fragments[STEPS][32];
    __shared__ u16 new_codes[2][2 * ROW_WORDS];
    __shared__ uint2 new_scale;
    __shared__ float q_peak[COLUMNS], q_sum[COLUMNS];
    __shared__ float part_peak[WARPS][COLUMNS], part_total[WARPS][COLUMNS];
    __shared__ bool is_last;
    Tile(*const ring)[STAGES] = reinterpret_cast<Tile(*)[STAGES]>(memory);
    auto part = [&](int of_warp) { return reinterpret_cast<float(*)[ROW]>(ring[of_warp]); };  // once its ring is done
    static_assert(sizeof(Tile) * STAGES >= sizeof(float) * COLUMNS * ROW, "part lies in the ring");
    pdl_launch();

    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, j = lane & 3;
    const int rows = gridDim.z / teams, team = blockIdx.z / rows, row = blockIdx.z - team * rows, rank = blockIdx.x;
    const int heads = group * kv_heads, chunks = (group + COLUMNS - 1) / COLUMNS;
    const int kv_head = chunks == 1 ? blockIdx.y : blockIdx.y / chunks, first_column = (blockIdx.y - kv_head * chunks) * COLUMNS;
    const int columns = min(COLUMNS, group - first_column);
    const int first_head = row * (FUSED ? heads + 2 * kv_heads : heads);
    auto source = [&](int job) {  // of a query, of the key, of the value: where in qkv
        const int head = job < COLUMNS ? kv_head * group + first_column + job : heads + (job - COLUMNS) * kv_heads + kv_head;
        return (u32)(first_head + head) * HEAD_DIM;
    };
    const u32 my_source = kept(source(warp));  // now, not when the wait is over
    if (!FUSED) pdl_wait();
    const int query_position = load_now(position + row), my_slot = load_now(slot + row);
    Head head;
    if (FUSED) head.load_angles<true>(cosine, sine, query_position);
    const int first = max(0, query_position - window + 1);
    const int first_tile = first / TOKENS, tiles = query_position / TOKENS + 1 - first_tile;
    constexpr int TEAM_WARPS = CLUSTER * WARPS;
    const int used_teams = tiles <= ENOUGH * TEAM_WARPS ? 1 : min(teams, (tiles + TEAM_WARPS - 1) / TEAM_WARPS);
    const int begin = used_teams == 1 ? 0 : tiles * team / used_teams;
    const int end = used_teams == 1 ? tiles : tiles * (team + 1) / used_teams;
    const int wanted = used_teams > 1 ? CLUSTER : 2 * ((tiles + WARPS - 1) / WARPS) - 1;
    int blocks = 1;  // a power of two
#pragma unroll
    for (int b = 2; b <= CLUSTER; b *= 2)
        if (b <= wanted) blocks = b;
    if (team >= used_teams || rank >= blocks) return;
    const bool has_new = FUSED && team == used_teams - 1 && rank == ((end - begin - 1) & (blocks - 1));

    const Sequence s = sequence(keys, values, scales, my_slot, kv_head, kv_heads, capacity);
    const int last_tile = first_tile + end - 1, stride = blocks * WARPS;
    const int my_first = first_tile + begin + rank + blocks * warp;
    const u32 my_ring = shared_address(ring[warp]);
    const u8* const my_keys = reinterpret_cast<const u8*>(s.keys) + lane * 16;
    const u8* const my_values = reinterpret_cast<const u8*>(s.values) + lane * 16;
    const u8* const my_scales = reinterpret_cast<const u8*>(s.scales) + lane * 16;
    auto copy_tile = [&](int stage, int tile) {
        const u32 to = my_ring + stage * (u32)sizeof(Tile);
        copy_by_warp<KEY_BYTES, false>(to, my_keys, tile);
        copy_by_warp<KEY_BYTES, true>(to + KEY_BYTES, my_values, tile);
        copy_by_warp<sizeof(Tile) - 2 * KEY_BYTES, false>(to + 2 * KEY_BYTES, my_scales, tile);
    };
    // Stages are asked for in order, those of all warps in turn.
    auto fill_ring = [&](bool early) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            if ((i * WARPS + warp < EARLY) != early) continue;
            if (my_first + i * stride <= last_tile) copy_tile(i, my_first + i * stride);
            commit_copies();
        }
    };
    const int slice = (columns * QUADS + blocks - 1) / blocks;  // of the sums, that this block adds up for its team
    const int slice_begin = rank * slice, slice_end = min(columns * QUADS, slice_begin + slice);
#if CLUSTER > 1
    __shared__ Part inbox[COLUMNS * QUADS + CLUSTER];  // of that slice, from each block
    __shared__ __align__(8) u64 inbox_barrier_word;
    const u32 inbox_barrier = shared_address(&inbox_barrier_word);
    if (blocks > 1) {
        if (threadIdx.x == 0) {
            barrier_init(inbox_barrier);
            barrier_init_done();
            barrier_expect(inbox_barrier, max(0, slice_end - slice_begin) * blocks * PART_BYTES);
        }
        __syncwarp();
        cluster_arrive();
    }
    auto send = [&](int index, const Part& p) {
        const int block = index / slice;
        const u32 to = shared_address(inbox + (rank * slice + index - block * slice));
        store_to_block(block, to, inbox_barrier, p.sum);
        store_to_block(block, to + (u32)sizeof(p.sum), inbox_barrier, float2{p.peak, p.total});
    };
#endif

    const i64 problem = (i64)row * gridDim.y + blockIdx.y;
    const int quads = min(group, COLUMNS) * QUADS, team_stride = rows * gridDim.y * quads;
    Part* const partial_of_teams = partial + problem * quads;
    fill_ring(true);
#if CLUSTER > 1
    if (blocks > 1) cluster_wait();  // the inboxes of all are ready
#endif
    if (FUSED) pdl_wait_together();
    // Asked for before what is left of the ring: loads come back in order.
    if (warp < columns || (has_new && COLUMNS <= warp && warp < JOBS)) head.load(qkv + my_source);
    fill_ring(false);
    if (used_teams > 1 && threadIdx.x == 32 * WARPS - 1)
        is_last = atomicInc(arrived + problem * CLUSTER + rank, used_teams - 1) == used_teams - 1;

    // ---- the queries, the new key and the new value
    for (int job = warp; job < JOBS; job += WARPS) {
        const bool is_query = job < COLUMNS, is_value = job > COLUMNS;
        if (is_query && job >= columns) {
            for (int i = lane; i < 8 * STEPS; i += 32) fragments[i / 8][8 * job + i % 8] = {0, 0};
            continue;
        }
        if (!is_query && !has_new) continue;
        if (job != warp) {
            head.load(qkv + source(job));
            if (FUSED) head.load_angles<true>(cosine, sine, query_position);
        }
        if (FUSED && !is_value) {
            const float* gain = is_query ? q_gain : k_gain;
            if (gain) head.normalize(gain, eps);
            head.rotate();
        }
        float* x = vectors[job];
        head.store(x, scratch[warp], FUSED && !is_value, paley, norm);
        if (is_query) {
            float peak, sum;
            split_query(fragments, x, job, peak, sum);
            if (lane == 0) q_peak[job] = peak, q_sum[job] = sum;
        } else {
            const i64 vector = ((i64)my_slot * kv_heads + kv_head) * capacity + query_position;
            const int odd = query_position % 2;
            u16* to = is_value ? reinterpret_cast<u16*>(values) + (vector - odd) * 2 * ROW_WORDS + odd
                               : reinterpret_cast<u16*>(keys) + vector * 2 * ROW_WORDS;
            const u32 scale_bits = quantize_head(x, is_value ? value_clip : key_clip, [&](int i, u16 codes) {
                new_codes[is_value][i] = codes;
                if (first_column == 0) to[is_value ? 2 * i : i] = codes;
            });
            if (lane == 0) {
                (is_value ? new_scale.y : new_scale.x) = scale_bits;
                if (first_column == 0) (is_value ? scales[vector].y : scales[vector].x) = scale_bits;
            }
        }
    }
    __syncthreads();
    Decode warp_columns;
    warp_columns.clear();
    warp_columns.position[0] = j < columns ? query_position : -1;
    warp_columns.factor[0] = j < columns ? scaled_down(q_peak[j]) * CODES * scale : 0.0f;
    warp_columns.sum[0] = j < columns ? q_sum[j] * scale : 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const uint2 both = fragments[step][lane];
        warp_columns.q[0][step][0] = both.x, warp_columns.q[0][step][1] = both.y;
    }

    // ---- this warp's tiles
    int stage = 0;
    for (int tile = my_first; tile <= last_tile; tile += stride) {
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        Tile& here = ring[warp][stage];
        if (has_new && tile == last_tile) {
            const int token = query_position % TOKENS, odd = token % 2;
            u16* key = reinterpret_cast<u16*>(here.keys) + token * 2 * ROW_WORDS;
            const int pair = (token - odd) * 2 * ROW_WORDS + odd;
            for (int i = lane; i < HALF_WORDS; i += 32) {
                key[i] = new_codes[0][i];
                reinterpret_cast<u16*>(here.values)[value_place(2 * (pair + 2 * i)) / 2] = new_codes[1][i];
            }
            if (lane == 0) here.scales[token] = new_scale;
            __syncwarp();
        }
        u32 words[BLOCKS_OF_16][2][WORDS], weight[BLOCKS_OF_16][1][2];
        uint2 scale_bits[BLOCKS_OF_16][2];
        float dot[BLOCKS_OF_16][1][4];
#pragma unroll
        for (int b = 0; b < BLOCKS_OF_16; b++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int token = 16 * b + 8 * half;
                load_words(words[b][half], here.keys + (token + g) * ROW_WORDS, j, 4);
                scale_bits[b][half] = here.scales[token + g];
            }
        warp_columns.multiply_keys(dot, words);
#pragma unroll
        for (int b = 0; b < BLOCKS_OF_16; b++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                load_words(words[b][half], here.values + (16 * b + 8 * half + 2 * j) * ROW_WORDS, VECTOR == 4 ? g ^ 2 * j : g, 8);
        __syncwarp();  // all lanes have read what is overwritten now
        const int coming = tile + STAGES * stride;
        if (coming <= last_tile) copy_tile(stage, coming);
        commit_copies();
        warp_columns.softmax(weight, dot, scale_bits, tile * TOKENS + g, first, query_position, window);
        warp_columns.add_values(weight, words);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    warp_columns.add_lanes();

    // ---- the sum of warps, of the team, of teams
    __syncwarp();
    warp_columns.for_each_unit([&](int, int channel, const float (&x)[UNIT]) {
        if (j >= columns) return;
        Unit unit;
#pragma unroll
        for (int c = 0; c < UNIT; c++) unit.x[c] = x[c];
        *reinterpret_cast<Unit*>(&part(warp)[j][channel]) = unit;
    });
    if (g == 0) {
        part_peak[warp][j] = warp_columns.peak[0];
        part_total[warp][j] = warp_columns.total[0];
    }
    __syncthreads();

    auto write_out = [&](int index, const Part& p) {
        const int column = index / QUADS, channel = index % QUADS * 4;
        float* to = out + (((i64)row * heads + kv_head * group + first_column + column) * HEAD_DIM + channel);
        const float inverse = __fdiv_rn(1.0f, p.total);
        if (channel < HEAD_DIM) *reinterpret_cast<float2*>(to) = {p.sum.x * inverse, p.sum.y * inverse};
        if (channel + 2 < HEAD_DIM) *reinterpret_cast<float2*>(to + 2) = {p.sum.z * inverse, p.sum.w * inverse};
    };
    auto write_team = [&](int index, const Part& p) {
        if (used_teams == 1) return write_out(index, p);
        Part* const to = partial_of_teams + (i64)team * team_stride + index;
        store_now(&to->sum, p.sum);
        store_now(reinterpret_cast<float2*>(&to->peak), float2{p.peak, p.total});
    };
    for (int index = threadIdx.x; index < columns * QUADS; index += 32 * WARPS) {
        const int column = index / QUADS, channel = index % QUADS * 4;
        Part p = {{0.0f, 0.0f, 0.0f, 0.0f}, NEVER, 0.0f};
#pragma unroll
        for (int w = 0; w < WARPS; w++) p.peak = fmaxf(p.peak, part_peak[w][column]);
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            add_part(p, *reinterpret_cast<const float4*>(&part(w)[column][channel]), part_peak[w][column], part_total[w][column]);
        if (blocks == 1) write_team(index, p);
#if CLUSTER > 1
        else send(index, p);
#endif
    }
#if CLUSTER > 1
    if (blocks > 1) {
        for (int index = slice_begin + threadIdx.x; index < slice_end; index += 32 * WARPS) {
            barrier_wait(inbox_barrier, 0);
            Part p = {{0.0f, 0.0f, 0.0f, 0.0f}, NEVER, 0.0f};
#pragma unroll
            for (int b = 0; b < CLUSTER; b++)
                if (b < blocks) p.peak = fmaxf(p.peak, inbox[b * slice + index - slice_begin].peak);
#pragma unroll
            for (int b = 0; b < CLUSTER; b++) {
                if (b >= blocks) break;
                const Part& sum = inbox[b * slice + index - slice_begin];
                add_part(p, sum.sum, sum.peak, sum.total);
            }
            write_team(index, p);
        }
    }
#endif
    if (used_teams == 1 || !is_last) return;

    for (int index = slice_begin + threadIdx.x; index < slice_end; index += 32 * WARPS) {
        Part p = {{0.0f, 0.0f, 0.0f, 0.0f}, NEVER, 0.0f};
        for (int first_of_some = 0; first_of_some < used_teams; first_of_some += TEAMS_AT_ONCE) {
            Part* const some = partial_of_teams + (i64)first_of_some * team_stride + index;
            Part of[TEAMS_AT_ONCE];
            take_parts(of, some, team_stride, min(TEAMS_AT_ONCE, used_teams - first_of_some));
#pragma unroll
            for (int t = 0; t < TEAMS_AT_ONCE; t++) {
                if (first_of_some + t >= used_teams) break;
                Part sum = {{0.0f, 0.0f, 0.0f, 0.0f}, fmaxf(p.peak, of[t].peak), 0.0f};
                add_part(sum, p.sum, p.peak, p.total);
                add_part(sum, of[t].sum, of[t].peak, of[t].total);
                p = sum;
            }
        }
        write_out(index, p);
    }
}
