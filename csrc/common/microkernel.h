// The register-blocked product that every matrix multiplication of our own is made of:
// C[i, :] (+)= scale[i] * sum over p of A[i, p] * B[p, :], for at most kRows rows and kVectors registers of columns.
#pragma once

#include <utility>

#include "common/vec.h"

namespace m4k::M4K_SIMD_NS {

// kRows * kVectors accumulators, kVectors registers of B and one of A fill the register file: 31 of 32, 15 of 16.
#if defined(M4K_SIMD_AVX512)
inline constexpr int kRows = 14;
#else
inline constexpr int kRows = 6;
#endif
inline constexpr int kVectors = 2;
inline constexpr int kPanel = kVectors * kLanes;  // columns of a whole register block

// What a step of the depth does to a register of sums: one product a lane, or of words of two bfloat16 both products.
struct Floats {
    static constexpr int kNumbers = 1;  // a word
    M4K_INLINE_MEMBER static vfloat multiply(vfloat a, vfloat b, vfloat sum) { return fma(a, b, sum); }
};
struct Bf16Pairs {
    static constexpr int kNumbers = 2;
    M4K_INLINE_MEMBER static vfloat multiply(vfloat a, vfloat b, vfloat sum) {
#if defined(M4K_SIMD_AVX512BF16)
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
        return fma(high_bf16(a), high_bf16(b), fma(low_bf16(a), low_bf16(b), sum));
#endif
    }
};

// A and B are float, or bfloat16 in pairs along the depth: then their elements, strides and the depth are of words.
struct Product {
    const float* a;  // element (i, p) at a[i * a_row + p * a_step]
    int64_t a_row;
    int64_t a_step;
    const float* b;  // row p at b + p * b_row, whole registers
    int64_t b_row;
    float* c;  // row i at c + i * c_row, whole registers
    int64_t c_row;
    int64_t depth;
    const float* scale;  // of row i at scale[i * scale_step]
    int64_t scale_step;
};

template <int Rows, int Vectors, bool Add, typename Kind>
static void block_product(const Product& x) {
    vfloat acc[Rows][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) acc[i][n] = splat(0.0f);
    }
    const float* a = x.a;
    const float* b = x.b;
    const int64_t row = x.a_row, a_step = x.a_step, b_row = x.b_row;
    for (int64_t p = x.depth; p > 0; --p) {
        vfloat bv[Vectors];
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) bv[n] = load(b + n * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            const vfloat av = splat(a[i * row]);
#pragma GCC unroll 2
            for (int n = 0; n < Vectors; ++n) acc[i][n] = Kind::multiply(av, bv[n], acc[i][n]);
        }
        a += a_step;
        b += b_row;
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
        const vfloat scale = splat(x.scale[i * x.scale_step]);
        float* c = x.c + i * x.c_row;
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) {
            const vfloat value = Add ? fma(acc[i][n], scale, load(c + n * kLanes)) : acc[i][n] * scale;
            store(c + n * kLanes, value);
        }
    }
}

using BlockProduct = void (*)(const Product&);

template <bool Add, typename Kind, int... Index>
static constexpr BlockProduct pick_block(int rows, int vectors, std::integer_sequence<int, Index...>) {
    constexpr BlockProduct table[] = {block_product<Index / kVectors + 1, Index % kVectors + 1, Add, Kind>...};
    return table[(rows - 1) * kVectors + vectors - 1];
}

template <bool Add, typename Kind = Floats>
M4K_INLINE void run_block(int rows, int vectors, const Product& x) {
    pick_block<Add, Kind>(rows, vectors, std::make_integer_sequence<int, kRows * kVectors>{})(x);
}

// Splits `total` rows into the fewest blocks of at most kRows, as equal as can be: a block of one row would wait for
// the latency of its few chains of additions.
struct Blocks {
    int count, size, larger;  // the first `larger` blocks have size + 1 rows
    explicit Blocks(int total) : count((total + kRows - 1) / kRows) {
        size = count ? total / count : 0;
        larger = count ? total % count : 0;
    }
    int rows(int i) const { return size + (i < larger); }
};

// At most kRows rows times all columns, `vectors` registers of them.
template <bool Add>
M4K_INLINE void rows_product(int rows, int vectors, Product x) {
    const auto whole = pick_block<Add, Floats>(rows, kVectors, std::make_integer_sequence<int, kRows * kVectors>{});
    for (; vectors >= kVectors; vectors -= kVectors) {
        whole(x);
        x.b += kPanel;
        x.c += kPanel;
    }
    if (vectors > 0) run_block<Add>(rows, vectors, x);
}

}  // namespace m4k::M4K_SIMD_NS
