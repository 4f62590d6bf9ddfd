// The intrinsics of the SIMD level; only for *_cpu.cpp files.
#pragma once

#if defined(M4K_SIMD_AVX512) && defined(M4K_EMULATE_AVX512)
#include "common/emulated_avx512.h"
#elif defined(M4K_SIMD_AVX512) || defined(M4K_SIMD_AVX2)
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms of GCC 12 inside its own intrinsics
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
