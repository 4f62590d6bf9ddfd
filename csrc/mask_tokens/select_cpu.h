// Which positions of a modality are inputs and targets, from their keys: two order statistics found by counting, which
// vectorises, rather than by sorting.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "common/intrinsics.h"
#include "common/simd.h"

namespace m4k::masking::M4K_SIMD_NS {

// Keys are handled 64 at a time, so that a group's roles fill one machine word; the last group is filled up with kPad.
inline constexpr int kGroup = 64;
inline constexpr uint32_t kPad = 0xffffffffu;
inline constexpr int groups(int n) { return (n + kGroup - 1) / kGroup; }

// The first `rank` keys in (key, position) order are those below `key` and the first `ties` that equal it.
struct Threshold {
    uint32_t key;
    int32_t ties;
};

inline int32_t count_below(const uint32_t* keys, int n_groups, uint32_t bound) {
#if defined(M4K_SIMD_AVX512)
    const __m512i b = _mm512_set1_epi32(static_cast<int>(bound));
    int32_t count = 0;
    for (int g = 0; g < n_groups; ++g, keys += kGroup) {
        const auto below = [&](int i) { return _mm512_cmplt_epu32_mask(_mm512_loadu_si512(keys + 16 * i), b); };
        count += std::popcount(uint32_t{below(0)} | uint32_t{below(1)} << 16);
        count += std::popcount(uint32_t{below(2)} | uint32_t{below(3)} << 16);
    }
    return count;
#else
    uint32_t count = 0;
    for (int i = 0; i < n_groups * kGroup; ++i) count += keys[i] < bound;
    return static_cast<int32_t>(count);
#endif
}

// keys (groups(n) * kGroup,), 0 <= rank <= n.
inline Threshold find_threshold(const uint32_t* keys, int32_t n, int32_t rank) {
    if (rank == 0) return {0, 0};
    const int n_groups = groups(n);
    // Invariant: low has `below_low` <= rank smaller keys, high has `below_high` >= rank.
    uint64_t low = 0, high = uint64_t{1} << 32;
    int32_t below_low = 0, below_high = n;
    for (int step = 0; below_low != rank && high - low > 1; ++step) {
        // Keys are uniform, so interpolation needs about five steps; halving bounds the number for any other keys.
        const uint64_t span = high - low;
        uint64_t guess =
            step < 12 ? span * static_cast<uint64_t>(rank - below_low) / static_cast<uint64_t>(below_high - below_low)
                      : span / 2;
        guess = guess < 1 ? 1 : (guess > span - 1 ? span - 1 : guess);
        const int32_t below = count_below(keys, n_groups, static_cast<uint32_t>(low + guess));
        if (below <= rank) {
            low += guess;
            below_low = below;
        } else {
            high = low + guess;
            below_high = below;
        }
    }
    return {static_cast<uint32_t>(low), rank - below_low};
}

// Bit i of the result: keys[i] < bound, for one group.
inline uint64_t below_mask(const uint32_t* keys, uint32_t bound) {
    uint64_t mask = 0;
#if defined(M4K_SIMD_AVX512)
    const __m512i b = _mm512_set1_epi32(static_cast<int>(bound));
    for (int i = 0; i < 4; ++i) {
        mask |= uint64_t{_mm512_cmplt_epu32_mask(_mm512_loadu_si512(keys + 16 * i), b)} << (16 * i);
    }
#elif defined(M4K_SIMD_AVX2)
    const __m256i sign = _mm256_set1_epi32(INT32_MIN);
    const __m256i b = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(bound)), sign);
    for (int i = 0; i < 8; ++i) {
        const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
        const __m256i less = _mm256_cmpgt_epi32(b, _mm256_xor_si256(k, sign));
        mask |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(less)))) << (8 * i);
    }
#else
    uint8_t below[kGroup];
    for (int i = 0; i < kGroup; ++i) below[i] = keys[i] < bound;
    for (int i = 0; i < kGroup / 8; ++i) {
        uint64_t bytes;
        std::memcpy(&bytes, below + 8 * i, 8);
        // Every byte is 0 or 1: the product's top byte gathers them, the first in the lowest bit (little endian).
        mask |= (bytes * 0x0102040810204080u >> 56) << (8 * i);
    }
#endif
    return mask;
}

// The first of the keys in (key, position) order, group after group.
class Leaders {
  public:
    explicit Leaders(Threshold threshold) : key_(threshold.key), ties_(threshold.ties) {}

    // Bit i: keys[i] is one of them.
    uint64_t next(const uint32_t* keys) {
        uint64_t mask = below_mask(keys, key_);
        for (int i = 0; ties_ > 0 && i < kGroup; ++i) {  // about once in 10^5 samples
            if (keys[i] == key_) {
                mask |= uint64_t{1} << i;
                --ties_;
            }
        }
        return mask;
    }

  private:
    uint32_t key_;
    int32_t ties_;
};

// Calls visit(group, inputs, targets) with bit masks of the roles in each group of keys (groups(n) * kGroup,).
template <typename Visit>
void for_each_group(const uint32_t* keys, int32_t n, int32_t inputs, int32_t targets, Visit visit) {
    Leaders input(find_threshold(keys, n, inputs)), used(find_threshold(keys, n, inputs + targets));
    for (int g = 0; g < groups(n); ++g) {
        const uint64_t is_input = input.next(keys + g * kGroup);
        visit(g, is_input, used.next(keys + g * kGroup) & ~is_input);
    }
}

}  // namespace m4k::masking::M4K_SIMD_NS
