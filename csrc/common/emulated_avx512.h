// AVX-512 in software, to test its levels on a processor without it (M4KERNELS_EMULATE_AVX512, see setup.py): the
// intrinsics of SIMDe (https://github.com/simd-everywhere/simde) and, here, those that its release 0.7.4 lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>

#include <bit>
#include <cstdint>
#include <cstring>

#define M4K_EMULATED static inline __attribute__((always_inline))

namespace m4k::emulated {

template <typename Number>
struct Lanes {
    Number lane[16];
    template <typename Register>
    explicit Lanes(const Register& x) {
        static_assert(sizeof lane == sizeof x);
        std::memcpy(lane, &x, sizeof x);
    }
    template <typename Register>
    operator Register() const {
        Register x;
        static_assert(sizeof lane == sizeof x);
        std::memcpy(&x, lane, sizeof x);
        return x;
    }
};

M4K_EMULATED float without_denormal(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((bits & 0x7f800000u) ? bits : bits & 0x80000000u);
}

// In the order of the compilers' own: halves, quarters, pairs.
M4K_EMULATED float reduce_add(__m512 x) {
    Lanes<float> sums(x);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums.lane[i] += sums.lane[i + half];
    }
    return sums.lane[0];
}
M4K_EMULATED float reduce_max(__m512 x) {
    Lanes<float> largest(x);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            const float a = largest.lane[i], b = largest.lane[i + half];
            largest.lane[i] = a > b ? a : b;  // the second where one is NaN, as the instruction does
        }
    }
    return largest.lane[0];
}
M4K_EMULATED __mmask16 less_unsigned(__m512i a, __m512i b) {
    const Lanes<uint32_t> left(a), right(b);
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint32_t{left.lane[i] < right.lane[i]} << i;
    return static_cast<__mmask16>(mask);
}
M4K_EMULATED __m256i low_halves(__m512i x) {
    const Lanes<uint32_t> words(x);
    Lanes<uint16_t> halves(_mm256_setzero_si256());
    for (int i = 0; i < 16; ++i) halves.lane[i] = static_cast<uint16_t>(words.lane[i]);
    return halves;
}
M4K_EMULATED __m512i from_halves(__m256i x) {
    const Lanes<uint16_t> halves(x);
    Lanes<uint32_t> words(_mm512_setzero_si512());
    for (int i = 0; i < 16; ++i) words.lane[i] = halves.lane[i];
    return words;
}
// To the nearest bfloat16, half to even; denormals become 0.
M4K_EMULATED __m256i to_bf16(__m512 x) {
    const Lanes<float> numbers(x);
    Lanes<uint16_t> halves(_mm256_setzero_si256());
    for (int i = 0; i < 16; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(without_denormal(numbers.lane[i]));
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        const uint32_t rounded = is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
        halves.lane[i] = static_cast<uint16_t>(rounded >> 16);
    }
    return halves;
}
// sum + both products of the words' two bfloat16, the upper first; denormals of any of them count as 0.
M4K_EMULATED __m512 multiply_bf16(__m512 sum, __m512bh a, __m512bh b) {
    const Lanes<uint32_t> left(a), right(b);
    Lanes<float> sums(sum);
    for (int i = 0; i < 16; ++i) {
        const auto product = [&](int shift, float total) {
            const float x = std::bit_cast<float>(left.lane[i] << shift & 0xffff0000u);
            const float y = std::bit_cast<float>(right.lane[i] << shift & 0xffff0000u);
            return without_denormal(__builtin_fmaf(without_denormal(x), without_denormal(y), without_denormal(total)));
        };
        sums.lane[i] = product(16, product(0, sums.lane[i]));
    }
    return sums;
}
// The instruction faults where the address is not a multiple of 64; here UndefinedBehaviorSanitizer says so.
M4K_EMULATED void stream(float* p, __m512 x) { *static_cast<__m512*>(static_cast<void*>(p)) = x; }

}  // namespace m4k::emulated

// SIMDe's own product keeps denormals; where a compiler's is a macro, that goes first.
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_cmplt_epu32_mask
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtneps_pbh
#undef _mm512_dpbf16_ps
#undef _mm512_stream_ps
#define _mm512_reduce_add_ps m4k::emulated::reduce_add
#define _mm512_reduce_max_ps m4k::emulated::reduce_max
#define _mm512_cmplt_epu32_mask m4k::emulated::less_unsigned
#define _mm512_cvtepi32_epi16 m4k::emulated::low_halves
#define _mm512_cvtepu16_epi32 m4k::emulated::from_halves
#define _mm512_cvtneps_pbh m4k::emulated::to_bf16
#define _mm512_dpbf16_ps m4k::emulated::multiply_bf16
#define _mm512_stream_ps m4k::emulated::stream
