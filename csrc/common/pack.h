// Bringing matrices into the panels of whole registers that register blocks read. Only for *_cpu.cpp files.
#pragma once

#include "common/vec.h"

namespace m4k::M4K_SIMD_NS {

M4K_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Four floats of each of kLanes rows, transposed: to[d * to_step + j] = from[j * step + d].
M4K_INLINE void transpose_four(const float* from, int64_t step, float* to, int64_t to_step) {
#if defined(M4K_SIMD_AVX512)
    // Register i holds rows i, i + 4, i + 8, i + 12, one in each 128-bit part; then 4x4 transposes within the parts.
    __m512 row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(from + i * step));
        x = _mm512_insertf32x4(x, _mm_loadu_ps(from + (i + 4) * step), 1);
        x = _mm512_insertf32x4(x, _mm_loadu_ps(from + (i + 8) * step), 2);
        row[i] = _mm512_insertf32x4(x, _mm_loadu_ps(from + (i + 12) * step), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpacklo_ps(row[2], row[3]);
    const __m512 c = _mm512_unpackhi_ps(row[0], row[1]), d = _mm512_unpackhi_ps(row[2], row[3]);
    store(to, _mm512_shuffle_ps(a, b, 0x44));
    store(to + to_step, _mm512_shuffle_ps(a, b, 0xee));
    store(to + 2 * to_step, _mm512_shuffle_ps(c, d, 0x44));
    store(to + 3 * to_step, _mm512_shuffle_ps(c, d, 0xee));
#elif defined(M4K_SIMD_AVX2)
    __m256 row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * step)),
                                      _mm_loadu_ps(from + (i + 4) * step), 1);
    }
    const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpacklo_ps(row[2], row[3]);
    const __m256 c = _mm256_unpackhi_ps(row[0], row[1]), d = _mm256_unpackhi_ps(row[2], row[3]);
    store(to, _mm256_shuffle_ps(a, b, 0x44));
    store(to + to_step, _mm256_shuffle_ps(a, b, 0xee));
    store(to + 2 * to_step, _mm256_shuffle_ps(c, d, 0x44));
    store(to + 3 * to_step, _mm256_shuffle_ps(c, d, 0xee));
#else
    for (int d = 0; d < 4; ++d) {
        for (int j = 0; j < kLanes; ++j) to[d * to_step + j] = from[j * step + d];
    }
#endif
}

}  // namespace m4k::M4K_SIMD_NS
