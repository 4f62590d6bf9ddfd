// GELU with the exact normal distribution, x Phi(x), and its derivative. Only for *_cpu.cpp files.
#pragma once

#include "common/vec.h"

namespace m4k::M4K_SIMD_NS {

// Lane by lane: `a` where x < 0, else `b`.
M4K_INLINE vfloat where_negative(vfloat x, vfloat a, vfloat b) {
#if defined(M4K_SIMD_AVX512)
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
#elif defined(M4K_SIMD_AVX2)
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
#else
    return x < splat(0.0f) ? a : b;
#endif
}

// Phi(-|x|) = exp(-x**2 / 2) s P(s) with s = 1 / (1 + 0.46 |x|), P a minimax polynomial of our own: 2e-8 off at most,
// 9e-8 with the rounding of floats, which is 1.5 ulp of the 1/2 at 0. `bell` is exp(-x**2 / 2).
M4K_INLINE vfloat lower_tail(vfloat x, vfloat* bell) {
    const vfloat size = vmax(splat(0.0f) - x, x);  // in this order a NaN survives
    const vfloat s = splat(1.0f) / fma(splat(0x1.d70a3ep-2f), size, splat(1.0f));
    *bell = vexp(size * size * splat(-0.5f));
    vfloat p = splat(-0x1.58141ap-5f);
    p = fma(p, s, splat(0x1.d87ea2p-3f));
    p = fma(p, s, splat(-0x1.e9718ep-2f));
    p = fma(p, s, splat(0x1.785ae4p-2f));
    p = fma(p, s, splat(0x1.1ef5f8p-5f));
    p = fma(p, s, splat(0x1.a3bd10p-3f));
    p = fma(p, s, splat(0x1.743928p-3f));
    return p * s * *bell;
}

M4K_INLINE vfloat gelu(vfloat x) {
    vfloat bell;
    const vfloat tail = lower_tail(x, &bell);
    return x * where_negative(x, tail, splat(1.0f) - tail);
}

// Phi(x) + x phi(x)
M4K_INLINE vfloat gelu_slope(vfloat x) {
    vfloat bell;
    const vfloat tail = lower_tail(x, &bell);
    return fma(x * bell, splat(0.398942280f), where_negative(x, tail, splat(1.0f) - tail));
}

}  // namespace m4k::M4K_SIMD_NS
