// CUDA C++ for g++: the words of the language, and one block of threads at a time as fibers of one thread of the CPU.
//
// A thread runs until it waits for others, then another one does, of its own warp if any can: threads are as far apart
// as the barriers allow. So a barrier that is missing shows; with `backwards`, threads and blocks run in the opposite
// order. Shared memory is thread_local, so that "extern __shared__" is C++ too; emulator.py adds what that declares.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <ucontext.h>
#include <utility>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

struct char4 { signed char x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static int2 make_int2(int x, int y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Threads

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

constexpr int MOST_THREADS = 1024, GUARD_BYTES = 1024;

struct Barrier {
    unsigned arrived, rounds;
};
struct Thread {
    jmp_buf here;
    bool started, ended;
    const Barrier* at;  // what it waits for, while at->rounds is `round`
    unsigned round;
};
struct Warp {
    Barrier barrier;
    const char* what;  // the operation in which its lanes meet
    alignas(16) unsigned char operand[32 * 64], result[2][32 * 16];
};

static Thread threads[MOST_THREADS];
static ucontext_t starts[MOST_THREADS];
static Warp warps[MOST_THREADS / 32];
static Barrier block_barrier;
static int current, count, running, votes[2];
static unsigned blocks_begun;
static bool backwards;
static sigjmp_buf outside;
static char failure[256];

[[noreturn]] __noinline__ static void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int n = snprintf(failure, sizeof failure, "block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z, current);
    vsnprintf(failure + n, sizeof failure - n, format, arguments);
    siglongjmp(outside, 1);
}

__noinline__ static void switch_to(int next) {
    if (_setjmp(threads[current].here)) return;
    current = next;
    threadIdx.x = next;
    if (threads[next].started) _longjmp(threads[next].here, 1);
    threads[next].started = true;
    setcontext(&starts[next]);
}
static bool can_run(int thread) {
    const Thread& t = threads[thread];
    return !t.ended && !(t.at && t.at->rounds == t.round);
}
__noinline__ static void let_others_run() {
    const int step = backwards ? -1 : 1, lane = current & 31;
    for (int i = 1; i < 32; ++i) {
        const int other = current - lane + ((lane + step * i) & 31);
        if (can_run(other)) return switch_to(other);
    }
    for (int i = 1; i < count; ++i) {
        const int other = (current + step * i + count) % count;
        if (can_run(other)) return switch_to(other);
    }
    fail("all threads wait, this one %s", threads[current].at == &block_barrier ? "for the block" : "in a warp");
}
static void clear_next_vote() { votes[~block_barrier.rounds & 1] = 0; }

// Returns when `expected` threads have come; the last one calls `act` before the others go on.
template <class Act>
static void meet(Barrier& barrier, int expected, Act act) {
    if (++barrier.arrived == (unsigned)expected) {
        act();
        barrier.arrived = 0;
        ++barrier.rounds;
        return;
    }
    Thread& me = threads[current];
    me.at = &barrier, me.round = barrier.rounds;
    let_others_run();
    me.at = nullptr;
}

static int __syncthreads_or(int vote) {
    int& any = votes[block_barrier.rounds & 1];
    any |= vote != 0;
    meet(block_barrier, running, clear_next_vote);
    return any;
}
static void __syncthreads() { __syncthreads_or(0); }

// What all lanes of a warp do together: compute(operands[32], results[32]).
template <class Result, class Operand, class Compute>
static Result together(const char* what, const Operand& operand, Compute compute) {
    static_assert(sizeof(Operand) <= 64 && sizeof(Result) <= 16);
    const int lane = current & 31;
    Warp& warp = warps[current >> 5];
    if (warp.barrier.arrived == 0) warp.what = what;
    if (strcmp(warp.what, what)) fail("in %s, while other lanes are in %s", what, warp.what);
    Operand* const operands = (Operand*)warp.operand;
    Result* const results = (Result*)warp.result[warp.barrier.rounds & 1];
    operands[lane] = operand;
    meet(warp.barrier, 32, [&] { compute(operands, results); });
    return results[lane];
}
static void check_mask(unsigned mask) {
    if (mask != 0xffffffffu) fail("mask %08x: only whole warps are known here", mask);
}
static void __syncwarp() {
    together<int>("__syncwarp", 0, [](int*, int*) {});
}
template <class T>
static T shuffle(const char* what, unsigned mask, T value, int from) {
    struct Operand { T value; int from; };
    check_mask(mask);
    return together<T>(what, Operand{value, from}, [](const Operand* in, T* out) {
        for (int i = 0; i < 32; ++i) out[i] = in[in[i].from].value;
    });
}
template <class T>
static T __shfl_sync(unsigned mask, T value, int lane) { return shuffle("__shfl_sync", mask, value, lane & 31); }
template <class T>
static T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return shuffle("__shfl_xor_sync", mask, value, ((current & 31) ^ lanes) & 31);
}
template <class T>
static T __shfl_up_sync(unsigned mask, T value, int lanes) {
    const int lane = current & 31;
    return shuffle("__shfl_up_sync", mask, value, lane < lanes ? lane : lane - lanes);
}
static unsigned __ballot_sync(unsigned mask, int vote) {
    check_mask(mask);
    return together<unsigned>("__ballot_sync", vote, [](const int* in, unsigned* out) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (unsigned)(in[i] != 0) << i;
        for (int i = 0; i < 32; ++i) out[i] = bits;
    });
}
static int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
static unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    check_mask(mask);
    return together<unsigned>("__reduce_max_sync", value, [](const unsigned* in, unsigned* out) {
        unsigned most = 0;
        for (int i = 0; i < 32; ++i) most = in[i] > most ? in[i] : most;
        for (int i = 0; i < 32; ++i) out[i] = most;
    });
}
static unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    check_mask(mask);
    return together<unsigned>("__reduce_add_sync", value, [](const unsigned* in, unsigned* out) {
        unsigned sum = 0;
        for (int i = 0; i < 32; ++i) sum += in[i];
        for (int i = 0; i < 32; ++i) out[i] = sum;
    });
}

// ---- Memory

static void __threadfence() {}
template <class T>
static T __ldg(const T* from) { return *from; }
template <class T>
static T __ldcg(const T* from) { return *from; }
template <class T>
static T __ldcs(const T* from) { return *from; }
template <class T>
static void __stcg(T* to, T value) { *to = value; }
template <class T>
static T exchange(T* at, T value) { return std::exchange(*at, value); }
template <class T>
static T atomicAdd(T* at, T value) { return exchange(at, (T)(*at + value)); }
template <class T>
static T atomicMax(T* at, T value) { return exchange(at, value > *at ? value : *at); }
template <class T>
static T atomicOr(T* at, T value) { return exchange(at, (T)(*at | value)); }
static unsigned atomicInc(unsigned* at, unsigned last) { return exchange(at, *at >= last ? 0 : *at + 1); }

// ---- Arithmetic

template <class T>
static T min(T a, T b) { return b < a ? b : a; }
template <class T>
static T max(T a, T b) { return a < b ? b : a; }
template <class To, class From>
static To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static int __float_as_int(float x) { return bits_as<int>(x); }
static unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
static float __int_as_float(int x) { return bits_as<float>(x); }
static float __uint_as_float(unsigned x) { return bits_as<float>(x); }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fsqrt_rn(float a) { return sqrtf(a); }
static float __frcp_rn(float a) { return 1.0f / a; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
static unsigned long long __double2ull_rn(double x) { return (unsigned long long)nearbyint(x); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) {
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> 8 * (selectors >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

// ---- Launches

struct Launch {
    const unsigned* sizes;  // grid (3), threads of a block, bytes of dynamic shared memory
    int backwards;
    unsigned char* memory;  // for it, and GUARD_BYTES
    char* stacks;           // of all threads, STACK_BYTES each
};

constexpr unsigned char GARBAGE = 0xa5;

static void (*body)();  // a thread's

static void thread_main() {
    body();
    threads[current].ended = true;
    if (--running == 0) siglongjmp(outside, 2);
    if (block_barrier.arrived == (unsigned)running) {  // who has ended is not waited for
        clear_next_vote();
        block_barrier.arrived = 0;
        ++block_barrier.rounds;
    }
    let_others_run();
}

static void run_block(const Launch& launch) {
    ++blocks_begun;
    block_barrier = {};
    votes[0] = votes[1] = 0;
    running = count = launch.sizes[3];
    for (int i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        thread.started = thread.ended = false;
        thread.at = nullptr;
        warps[i >> 5].barrier = {};
        stack_t& stack = starts[i].uc_stack;
        if (!stack.ss_size) getcontext(&starts[i]);
        stack.ss_size = STACK_BYTES;
        stack.ss_sp = launch.stacks + (size_t)i * STACK_BYTES;
        makecontext(&starts[i], thread_main, 0);
    }
    const unsigned memory_bytes = launch.sizes[4] + GUARD_BYTES;
    memset(launch.memory, GARBAGE, memory_bytes);
    current = backwards ? count - 1 : 0;
    threadIdx = {(unsigned)current, 0, 0};
    if (!sigsetjmp(outside, 1)) {
        threads[current].started = true;
        setcontext(&starts[current]);
    }
    for (unsigned i = launch.sizes[4]; !*failure && i < memory_bytes; ++i)
        if (launch.memory[i] != GARBAGE)
            snprintf(failure, sizeof failure, "dynamic shared memory is written at byte %u of %u", i, launch.sizes[4]);
}

static void on_signal(int signal) {
    fail(signal == SIGILL ? "misaligned, or an index beyond an array, or undefined" : "memory that is not an argument's");
}

// What went wrong, or null.
static const char* run_grid(const Launch& launch) {
    constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {}, before[4];
    action.sa_handler = on_signal;
    action.sa_flags = SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &action, before + i);
    *failure = 0;
    backwards = launch.backwards;
    gridDim = {launch.sizes[0], launch.sizes[1], launch.sizes[2]}, blockDim = {launch.sizes[3], 1, 1};
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    for (unsigned i = 0; i < blocks && !*failure; ++i) {
        const unsigned block = backwards ? blocks - 1 - i : i;
        blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
        run_block(launch);
    }
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], before + i, nullptr);
    return *failure ? failure : nullptr;
}

// A kernel's parameters: how NumPy calls each one's type, and a call with them.
static char code_of(const void*) { return 'P'; }
static char code_of(int) { return 'i'; }
static char code_of(unsigned) { return 'I'; }
static char code_of(long long) { return 'q'; }
static char code_of(unsigned long long) { return 'Q'; }
static char code_of(float) { return 'f'; }
template <class... P>
static const char* codes_of(void (*)(P...)) {
    static const char codes[] = {code_of(P{})..., 0};
    return codes;
}
template <class... P, size_t... I>
static void call(void (*kernel)(P...), void* const* arguments, std::index_sequence<I...>) {
    kernel(*(P*)arguments[I]...);
}
template <class... P>
static void call(void (*kernel)(P...), void* const* arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>{});
}
