// One register of floats, with the operations that the CPU kernels need; only for *_cpu.cpp files, where the SIMD level
// decides its width. Everything is forced inline in the level's namespace, so that no object file exports code which
// another level could pick up.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/intrinsics.h"
#include "common/simd.h"

#define M4K_INLINE static inline __attribute__((always_inline))
#define M4K_INLINE_MEMBER inline __attribute__((always_inline))

namespace m4k::M4K_SIMD_NS {

#if defined(M4K_SIMD_AVX512)

using vfloat = __m512;
inline constexpr int kLanes = 16;

M4K_INLINE vfloat load(const float* p) { return _mm512_loadu_ps(p); }
M4K_INLINE void store(float* p, vfloat x) { _mm512_storeu_ps(p, x); }
// Past the caches: p a multiple of the register's size. stream_end() before another thread reads it.
M4K_INLINE void stream(float* p, vfloat x) { _mm512_stream_ps(p, x); }
M4K_INLINE void stream_end() { _mm_sfence(); }
M4K_INLINE vfloat splat(float x) { return _mm512_set1_ps(x); }
M4K_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
M4K_INLINE vfloat vmax(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
M4K_INLINE vfloat vsqrt(vfloat x) { return _mm512_sqrt_ps(x); }
M4K_INLINE float reduce_add(vfloat x) { return _mm512_reduce_add_ps(x); }
M4K_INLINE float reduce_max(vfloat x) { return _mm512_reduce_max_ps(x); }
// The first n lanes of x, `fill` in the others.
M4K_INLINE vfloat first_lanes(vfloat x, int n, vfloat fill) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1u), fill, x);
}
M4K_INLINE vfloat round_even(vfloat x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2**n for an integral n, where x >= low; else 0.
M4K_INLINE vfloat scale_or_zero(vfloat x, vfloat n, vfloat argument, vfloat low) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(argument, low, _CMP_NLT_UQ), x, n);
}
M4K_INLINE vfloat load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// A register of words of two bfloat16: the first in the low half.
M4K_INLINE vfloat low_bf16(vfloat x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
M4K_INLINE vfloat high_bf16(vfloat x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
}
// To the nearest bfloat16, half to even; a NaN stays one.
#if defined(M4K_SIMD_AVX512BF16)
M4K_INLINE vfloat round_bf16(vfloat x) {  // denormals become 0, as its products take them
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}
#else
M4K_INLINE vfloat round_bf16(vfloat x) {
    const __m512i bits = _mm512_castps_si512(x),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return high_bf16(_mm512_castsi512_ps(_mm512_mask_blend_epi32(is_nan, rounded, nan)));
}
#endif
// Words of numbers that are bfloat16 already.
M4K_INLINE vfloat pair_bf16(vfloat first, vfloat second) {
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second)));
}
M4K_INLINE void store_bf16(uint16_t* p, vfloat x) {
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}

#elif defined(M4K_SIMD_AVX2)

using vfloat = __m256;
inline constexpr int kLanes = 8;

M4K_INLINE vfloat load(const float* p) { return _mm256_loadu_ps(p); }
M4K_INLINE void store(float* p, vfloat x) { _mm256_storeu_ps(p, x); }
M4K_INLINE void stream(float* p, vfloat x) { _mm256_stream_ps(p, x); }
M4K_INLINE void stream_end() { _mm_sfence(); }
M4K_INLINE vfloat splat(float x) { return _mm256_set1_ps(x); }
M4K_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
M4K_INLINE vfloat vmax(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
M4K_INLINE vfloat vsqrt(vfloat x) { return _mm256_sqrt_ps(x); }
M4K_INLINE float reduce_add(vfloat x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
M4K_INLINE float reduce_max(vfloat x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
M4K_INLINE vfloat first_lanes(vfloat x, int n, vfloat fill) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(fill, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
M4K_INLINE vfloat round_even(vfloat x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
M4K_INLINE vfloat scale_or_zero(vfloat x, vfloat n, vfloat argument, vfloat low) {
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), power));
    return _mm256_and_ps(_mm256_cmp_ps(argument, low, _CMP_NLT_UQ), scaled);
}
M4K_INLINE vfloat load_bf16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

M4K_INLINE vfloat low_bf16(vfloat x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
M4K_INLINE vfloat high_bf16(vfloat x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(-65536))); }
M4K_INLINE vfloat round_bf16(vfloat x) {
    const __m256i bits = _mm256_castps_si256(x),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
    return high_bf16(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
M4K_INLINE vfloat pair_bf16(vfloat first, vfloat second) {
    return _mm256_or_ps(_mm256_castsi256_ps(_mm256_srli_epi32(_mm256_castps_si256(first), 16)), second);
}
M4K_INLINE void store_bf16(uint16_t* p, vfloat x) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

#else

// Four lanes in the compilers' own vector type: SSE2 on x86-64, NEON on aarch64.
typedef float vfloat __attribute__((vector_size(16)));
typedef int32_t vint __attribute__((vector_size(16)));
inline constexpr int kLanes = 4;

M4K_INLINE vfloat load(const float* p) {
    vfloat x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
M4K_INLINE void store(float* p, vfloat x) { std::memcpy(p, &x, sizeof x); }
M4K_INLINE void stream(float* p, vfloat x) { store(p, x); }
M4K_INLINE void stream_end() {}
M4K_INLINE vfloat splat(float x) { return vfloat{x, x, x, x}; }
M4K_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__aarch64__)
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
M4K_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
M4K_INLINE vfloat vsqrt(vfloat x) {
    return vfloat{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
}
M4K_INLINE float reduce_add(vfloat x) { return (x[0] + x[2]) + (x[1] + x[3]); }
M4K_INLINE float reduce_max(vfloat x) {
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}
M4K_INLINE vfloat first_lanes(vfloat x, int n, vfloat fill) { return vint{0, 1, 2, 3} < vint{n, n, n, n} ? x : fill; }
// Adding and subtracting 1.5 * 2**23 rounds to an integer, half to even; for |x| < 2**22.
M4K_INLINE vfloat round_even(vfloat x) {
    const vfloat magic = splat(12582912.0f);
    return (x + magic) - magic;
}
M4K_INLINE vfloat scale_or_zero(vfloat x, vfloat n, vfloat argument, vfloat low) {
    // The low bits of n + 1.5 * 2**23 are the integer n.
    const vfloat shifted = n + splat(12582912.0f);
    vint power, bits;
    std::memcpy(&power, &shifted, sizeof power);
    std::memcpy(&bits, &x, sizeof bits);
    bits = argument < low ? vint{0, 0, 0, 0} : bits + (power << 23);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
M4K_INLINE vfloat load_bf16(const uint16_t* p) {
    const uint32_t bits[4] = {uint32_t{p[0]} << 16, uint32_t{p[1]} << 16, uint32_t{p[2]} << 16, uint32_t{p[3]} << 16};
    vfloat x;
    std::memcpy(&x, bits, sizeof x);
    return x;
}

M4K_INLINE vint as_bits(vfloat x) {
    vint bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
M4K_INLINE vfloat from_bits(vint bits) {
    vfloat x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
M4K_INLINE vfloat low_bf16(vfloat x) { return from_bits(as_bits(x) << 16); }
M4K_INLINE vfloat high_bf16(vfloat x) { return from_bits(as_bits(x) & -65536); }
M4K_INLINE vfloat round_bf16(vfloat x) {
    typedef uint32_t vuint __attribute__((vector_size(16)));
    const vuint bits = (vuint)as_bits(x);
    const vuint rounded = bits + 0x7fffu + ((bits >> 16) & 1u), nan = bits | 0x400000u;
    return high_bf16(from_bits((vint)(x == x ? rounded : nan)));
}
M4K_INLINE vfloat pair_bf16(vfloat first, vfloat second) {
    typedef uint32_t vuint __attribute__((vector_size(16)));
    return from_bits((vint)((vuint)as_bits(first) >> 16) | as_bits(second));
}
M4K_INLINE void store_bf16(uint16_t* p, vfloat x) {
    const vint bits = as_bits(x);
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(static_cast<uint32_t>(bits[i]) >> 16);
}

#endif

// exp(x) for x <= 88, within 1 ulp; exactly 0 below -87, so that no denormal slows what follows; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) = 1 + r + r**2 Q(r), Q a minimax polynomial (relative error 4e-9).
M4K_INLINE vfloat vexp(vfloat x) {
    const vfloat low = splat(-87.0f);
    const vfloat clamped = vmax(low, x);  // in this order a NaN in x survives on x86
    const vfloat n = round_even(clamped * splat(1.44269504f));
    vfloat r = fma(n, splat(-0.693359375f), clamped);  // ln 2 in two parts, the first with few bits: n * it is exact
    r = fma(n, splat(2.12194440e-4f), r);
    vfloat q = splat(0x1.6a241ap-10f);
    q = fma(q, r, splat(0x1.1239f2p-7f));
    q = fma(q, r, splat(0x1.5558f2p-5f));
    q = fma(q, r, splat(0x1.555492p-3f));
    q = fma(q, r, splat(0x1.fffffcp-2f));
    const vfloat y = fma(r * r, q, r) + splat(1.0f);
    return scale_or_zero(y, n, x, low);
}

}  // namespace m4k::M4K_SIMD_NS
