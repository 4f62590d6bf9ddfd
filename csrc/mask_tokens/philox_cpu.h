// Many Philox blocks at once, with the registers of the SIMD level that includes this.
#pragma once

#include <cstdint>

#include "common/intrinsics.h"
#include "common/philox.h"
#include "common/simd.h"

namespace m4k::masking::M4K_SIMD_NS {

#if defined(M4K_SIMD_AVX512)
struct Lanes {
    static constexpr int kWidth = 16;
    __m512i v;
    static Lanes load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
    static Lanes fill(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
    Lanes operator^(Lanes o) const { return {_mm512_xor_si512(v, o.v)}; }
    Lanes operator+(Lanes o) const { return {_mm512_add_epi32(v, o.v)}; }
    // (high, low) words of the products with m.
    void multiply(Lanes m, Lanes& high, Lanes& low) const {
        const __m512i even = _mm512_mul_epu32(v, m.v);
        const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), m.v);
        high.v = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
        low.v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
    }
    // Lane 4 l + i of the four goes, as four words in a row, to place i (kWidth / 4) + l: a transposition that stays
    // within each 128 bits.
    static void store_blocks(Lanes x0, Lanes x1, Lanes x2, Lanes x3, uint32_t* out) {
        const __m512i a = _mm512_unpacklo_epi32(x0.v, x1.v), b = _mm512_unpacklo_epi32(x2.v, x3.v);
        const __m512i c = _mm512_unpackhi_epi32(x0.v, x1.v), d = _mm512_unpackhi_epi32(x2.v, x3.v);
        _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
        _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
        _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(c, d));
        _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(c, d));
    }
};
#elif defined(M4K_SIMD_AVX2)
struct Lanes {
    static constexpr int kWidth = 8;
    __m256i v;
    static Lanes load(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
    static Lanes fill(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
    Lanes operator^(Lanes o) const { return {_mm256_xor_si256(v, o.v)}; }
    Lanes operator+(Lanes o) const { return {_mm256_add_epi32(v, o.v)}; }
    void multiply(Lanes m, Lanes& high, Lanes& low) const {
        const __m256i even = _mm256_mul_epu32(v, m.v);
        const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), m.v);
        high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
        low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    }
    static void store_blocks(Lanes x0, Lanes x1, Lanes x2, Lanes x3, uint32_t* out) {
        const __m256i a = _mm256_unpacklo_epi32(x0.v, x1.v), b = _mm256_unpacklo_epi32(x2.v, x3.v);
        const __m256i c = _mm256_unpackhi_epi32(x0.v, x1.v), d = _mm256_unpackhi_epi32(x2.v, x3.v);
        __m256i* to = reinterpret_cast<__m256i*>(out);
        _mm256_storeu_si256(to, _mm256_unpacklo_epi64(a, b));
        _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(a, b));
        _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(c, d));
        _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(c, d));
    }
};
#else
struct Lanes {
    static constexpr int kWidth = 4;
    uint32_t v[kWidth];
    static Lanes load(const uint32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
    static Lanes fill(uint32_t x) { return {{x, x, x, x}}; }
    Lanes operator^(Lanes o) const {
        for (int i = 0; i < kWidth; ++i) o.v[i] ^= v[i];
        return o;
    }
    Lanes operator+(Lanes o) const {
        for (int i = 0; i < kWidth; ++i) o.v[i] += v[i];
        return o;
    }
    void multiply(Lanes m, Lanes& high, Lanes& low) const {
        for (int i = 0; i < kWidth; ++i) {
            const uint64_t p = uint64_t{v[i]} * m.v[i];
            high.v[i] = static_cast<uint32_t>(p >> 32);
            low.v[i] = static_cast<uint32_t>(p);
        }
    }
    static void store_blocks(Lanes x0, Lanes x1, Lanes x2, Lanes x3, uint32_t* out) {
        for (int i = 0; i < kWidth; ++i) {
            out[4 * i] = x0.v[i];
            out[4 * i + 1] = x1.v[i];
            out[4 * i + 2] = x2.v[i];
            out[4 * i + 3] = x3.v[i];
        }
    }
};
#endif

// The lane that Lanes::store_blocks writes to place n.
inline constexpr int lane_of(int n) { return 4 * (n % (Lanes::kWidth / 4)) + n / (Lanes::kWidth / 4); }

// The key and the part of the counter that a sample's blocks share.
struct Stream {
    uint64_t seed;
    uint32_t c1, c2, c3;

    // N registers of counters at once, since the rounds of one register wait for its multiplications: lane i of c0[r]
    // makes the block of the counter (c0[r][i], c1, c2, c3). `out` receives kWidth blocks in store_blocks' order for
    // each register.
    template <int N>
    void blocks(const Lanes (&c0)[N], uint32_t* out) const {
        Lanes x0[N], x1[N], x2[N], x3[N];
        for (int r = 0; r < N; ++r) {
            x0[r] = c0[r];
            x1[r] = Lanes::fill(c1);
            x2[r] = Lanes::fill(c2);
            x3[r] = Lanes::fill(c3);
        }
        const Lanes m0 = Lanes::fill(kPhiloxM0), m1 = Lanes::fill(kPhiloxM1);
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const Lanes key0 = Lanes::fill(k0), key1 = Lanes::fill(k1);
            for (int r = 0; r < N; ++r) {
                Lanes high0, low0, high1, low1;
                x0[r].multiply(m0, high0, low0);
                x2[r].multiply(m1, high1, low1);
                x0[r] = high1 ^ (x1[r] ^ key0);
                x1[r] = low1;
                x2[r] = high0 ^ (x3[r] ^ key1);
                x3[r] = low0;
            }
            k0 += kPhiloxW0;
            k1 += kPhiloxW1;
        }
        for (int r = 0; r < N; ++r) Lanes::store_blocks(x0[r], x1[r], x2[r], x3[r], out + r * 4 * Lanes::kWidth);
    }
};

}  // namespace m4k::masking::M4K_SIMD_NS
