// Integers by their size, and whether this is compiled for Hopper.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(RCP_NO_HOPPER)
#define RCP_HOPPER 1
#else
#define RCP_HOPPER 0
#endif
