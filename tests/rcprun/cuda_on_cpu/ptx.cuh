// kernels/ptx.cuh for a CPU: the same functions as plain C++. Those of Hopper are missing, as for an older GPU.
#pragma once
#include "types.cuh"

static void pdl_wait() {}
static void pdl_launch() {}

// ---- Floats

static u16 half_from_float(float x) {
    const u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return 0x7fff;
    if (rest >= 0x47800000) return sign | 0x7c00;                                                   // from 65,536 on
    if (rest < 0x38800000) return sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000);  // subnormal
    return sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
}
static float float_from_half(u16 h) {
    const u32 sign = (u32)(h & 0x8000) << 16, rest = (u32)(h & 0x7fff) << 13;
    if (rest >= 0x0f800000) return __uint_as_float(sign | 0x7f800000 | rest);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));
}
static u32 half_pair(float low, float high) { return half_from_float(low) | (u32)half_from_float(high) << 16; }
static float float_from_bf16(u16 h) { return __uint_as_float((u32)h << 16); }

// Rounded twice, to float and to half; the kernels' sums are exact in both.
static u32 multiply_add_half2(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int i = 0; i < 32; i += 16) {
        const float x = float_from_half(a >> i), y = float_from_half(b >> i), z = float_from_half(c >> i);
        result |= (u32)half_from_float(fmaf(x, y, z)) << i;
    }
    return result;
}
static u32 add_half2(u32 a, u32 b) { return multiply_add_half2(a, 0x3c003c00, b); }

static float max_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
static float exp2_approx(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
static float reciprocal(float x) { return fabsf(x) > 0x1p126f ? 0.0f : 1.0f / x; }

// ---- Words

static u32 masked_or(u32 word, u32 mask, u32 bits) { return (word & mask) | bits; }
static u32 upper_half(u32 x) { return x >> 16; }
static u32 look_up(u32 bytes, u32 selectors) {
    if (selectors & 0xcccc) fail("look_up: selectors %04x", selectors & 0xffff);
    return __byte_perm(bytes, 0, selectors);
}
static int dot(u32 counts, u32 bytes, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (u8)(counts >> i) * (i8)(bytes >> i);
    return sum;
}
static u32 kept(u32 x) { return x; }

// ---- Products of matrices

template <class C>
struct Fragments {
    u32 a[4], b[2];
    C c[4];
};
template <class C>
struct Product16x8 {
    C c[4];
};
// element(register, i): the i-th of E elements; product(c, its K pairs) -> c.
template <int E, class Element, class Sum, class C>
static void multiply_fragments(const char* what, C* c, const Fragments<C>& mine, Element element, Sum sum) {
    const Product16x8<C> result = together<Product16x8<C>>(what, mine, [&](const Fragments<C>* lane, Product16x8<C>* out) {
        decltype(element(0u, 0)) a[16][8 * E], b[8][8 * E];
        for (int i = 0; i < 32; ++i)
            for (int r = 0; r < 4; ++r)
                for (int e = 0; e < E; ++e) {
                    const int k = E * (i % 4 + r / 2 * 4) + e;
                    a[i / 4 + r % 2 * 8][k] = element(lane[i].a[r], e);
                    if (r % 2 == 0) b[i / 4][k] = element(lane[i].b[r / 2], e);
                }
        for (int i = 0; i < 32; ++i)
            for (int r = 0; r < 4; ++r) out[i].c[r] = sum(lane[i].c[r], a[i / 4 + r / 2 * 8], b[i % 4 * 2 + r % 2]);
    });
    for (int r = 0; r < 4; ++r) c[r] = result.c[r];
}
// c + a b, exact, then truncated: tensor cores do no worse.
static float truncated_sum(float c, const float (&a)[16], const float (&b)[16]) {
    double sum = c;
    for (int k = 0; k < 16; ++k) sum += (double)a[k] * b[k];
    const float rounded = (float)sum;
    return fabs((double)rounded) > fabs(sum) && rounded - rounded == 0 ? nextafterf(rounded, 0.0f) : rounded;
}
static i32 integer_sum(i32 c, const i32 (&a)[32], const i32 (&b)[32]) {
    for (int k = 0; k < 32; ++k) c += a[k] * b[k];
    return c;
}
static i32 common_bits(i32 c, const u32 (&a)[8], const u32 (&b)[8]) {
    for (int k = 0; k < 8; ++k) c += __popc(a[k] & b[k]);
    return c;
}

static void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const Fragments<float> mine = {{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    multiply_fragments<2>("mma of f16", c, mine, [](u32 x, int i) { return float_from_half(x >> 16 * i); }, truncated_sum);
}
static void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const Fragments<float> mine = {{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    multiply_fragments<2>("mma of bf16", c, mine, [](u32 x, int i) { return float_from_bf16(x >> 16 * i); }, truncated_sum);
}
static void mma(i32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const Fragments<i32> mine = {{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    multiply_fragments<4>("mma of int8", c, mine, [](u32 x, int i) { return (i32)(i8)(x >> 8 * i); }, integer_sum);
}
static int4 mma_bits(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    i32 c[4];
    multiply_fragments<1>("mma of bits", c, Fragments<i32>{{a0, a1, a2, a3}, {b0, b1}}, [](u32 x, int) { return x; }, common_bits);
    return {c[0], c[1], c[2], c[3]};
}

// ---- Memory. An address in shared memory is a distance from a variable there.

alignas(128) static thread_local char shared_origin;

static u32 shared_address(const void* p) { return (u32)((const char*)p - &shared_origin); }
template <class T>
static T* shared_pointer(u32 address) { return (T*)(&shared_origin + (i32)address); }
static uint2 load2(u32 address) { return *shared_pointer<uint2>(address); }
static uint4 load4(u32 address) { return *shared_pointer<uint4>(address); }
static void store1(u32 address, u32 v) { *shared_pointer<u32>(address) = v; }
template <class T>
static T load_now(const T* address) { return *address; }
template <class T>
static void store_now(T* address, T v) { *address = v; }
static uint4 load_once(const void* address) { return *(const uint4*)address; }

// Matrices of 8 x 8, transposed: lane (g, t) gets rows 2t and 2t + 1 of column g; lane i has the address of row i.
template <int N>
static void load_matrices(u32 (&b)[N], u32 address) {
    struct Registers { u32 of[4]; };
    const Registers mine = together<Registers>("ldmatrix", address, [](const u32* row, Registers* out) {
        for (int i = 0; i < 32; ++i)
            for (int matrix = 0; matrix < N; ++matrix) {
                const u32* const first = row + matrix * 8 + i % 4 * 2;
                if (first[0] % 16 || first[1] % 16) fail("ldmatrix: misaligned");
                const u16 low = shared_pointer<u16>(first[0])[i / 4], high = shared_pointer<u16>(first[1])[i / 4];
                out[i].of[matrix] = low | (u32)high << 16;
            }
    });
    for (int i = 0; i < N; ++i) b[i] = mine.of[i];
}
static void load_b(u32& b0, u32& b1, u32 address) {
    u32 b[2];
    load_matrices(b, address);
    b0 = b[0], b1 = b[1];
}
static void load_b(u32& b0, u32& b1, u32& next_b0, u32& next_b1, u32 address) {
    u32 b[4];
    load_matrices(b, address);
    b0 = b[0], b1 = b[1], next_b0 = b[2], next_b1 = b[3];
}

// Copies come as soon as they may or, backwards, as late.
struct Copies {
    static constexpr unsigned MOST = 128;
    struct { uint4* to; const uint4* from; unsigned group; } copy[MOST];
    unsigned block, begun, done, group;

    void finish(unsigned groups_left) {
        for (; done < begun && copy[done % MOST].group + groups_left < group; ++done)
            *copy[done % MOST].to = *copy[done % MOST].from;
    }
};
static Copies& my_copies() {
    static Copies copies[MOST_THREADS];
    Copies& mine = copies[current];
    if (mine.block != blocks_begun) mine.block = blocks_begun, mine.begun = mine.done = mine.group = 0;
    return mine;
}
static void copy_async(u32 to, const void* from) {
    Copies& c = my_copies();
    if (c.begun - c.done == Copies::MOST) fail("copy_async: too many at a time");
    c.copy[c.begun++ % Copies::MOST] = {shared_pointer<uint4>(to), (const uint4*)from, c.group};
}
static void commit_copies() {
    ++my_copies().group;
    if (!backwards) my_copies().finish(0);
}
template <int LEFT>
static void wait_for_copies() { my_copies().finish(LEFT); }
