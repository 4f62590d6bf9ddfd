// mask_tokens: the integer arithmetic of one draw, shared by every compiled backend, and the CPU entry points.
// The specification is m4kernels/ops/mask_tokens/reference.py; its names are used here.
#pragma once

#include <cstdint>
#include <vector>

#include "common/hostdevice.h"
#include "common/simd.h"

namespace m4k::masking {

// The purpose of a random word, bits 24 and up of the counter's first word; the modality is in bits 16 to 23.
enum Purpose : uint32_t {
    kSizes = 0,
    kInputDirichlet = 1,
    kInputLeftovers = 2,
    kTargetDirichlet = 3,
    kTargetLeftovers = 4,
    kPositions = 5
};
M4K_HD constexpr uint32_t counter0(uint32_t purpose, uint32_t modality, uint32_t block) {
    return (purpose << 24) + (modality << 16) + block;
}

// As in make_tables.py.
inline constexpr int kKnots = 32 * 64 + 1;  // of one tail of a Gamma table
inline constexpr int kNever = -1;           // in Side::rows
inline constexpr int kMaxModalities = 256;

// Roles of a position.
inline constexpr uint8_t kUnused = 0, kInput = 1, kTarget = 2;

M4K_HD int64_t uniform(uint32_t word, int64_t low, int64_t high) {
    const uint64_t range = static_cast<uint64_t>(high - low + 1);  // at most 2^31
    return low + static_cast<int64_t>((word * range) >> 32);
}

// Where v has its leading bit; v > 0.
M4K_HD int leading_bit(uint32_t v) {
#if defined(__CUDA_ARCH__)
    return 31 - __clz(static_cast<int>(v));
#else
    return 31 - __builtin_clz(v);
#endif
}

// log2 of a Gamma draw, Q20; table is (2, kKnots).
M4K_HD int32_t log_gamma_draw(uint32_t word, const int32_t* table) {
    const uint64_t v33 = 2 * uint64_t{word} + 1;
    const bool tail = (v33 >> 32) != 0;
    const uint32_t v = static_cast<uint32_t>(tail ? (uint64_t{1} << 33) - v33 : v33);
    const int e = leading_bit(v);
    const uint32_t h = (v << (31 - e)) & 0x7fffffffu;
    const int32_t* knot = table + (tail ? kKnots : 0) + 64 * e + (h >> 25);
    const int64_t rise = int64_t{knot[1]} - knot[0];
    return static_cast<int32_t>(knot[0] + ((rise * static_cast<int64_t>(h & 0x1ffffffu)) >> 25));
}

// 2^-(d / 2^20), Q30; table is (1025,).
M4K_HD int64_t exp2_weight(uint32_t d, const int32_t* exp2) {
    const uint32_t f = d & 0xfffffu, k = f >> 10;
    const int32_t rise = exp2[k + 1] - exp2[k];
    const int32_t value = exp2[k] + ((rise * static_cast<int32_t>(f & 1023u)) >> 10);
    const uint32_t shift = d >> 20;
    return value >> (shift < 31 ? shift : 31);
}

// The draw of the inputs or of the targets.
struct Side {
    std::vector<int32_t> rows;     // (M,) row of the modality's alpha in Plan::gamma, or kNever
    std::vector<int32_t> playing;  // the modalities that take part
    int64_t low, high;
};

struct Plan {
    std::vector<int32_t> lens;     // (M,)
    std::vector<int64_t> offsets;  // (M,) where a modality begins in a row of tokens
    Side inputs, targets;
    const int32_t* gamma;  // (alphas, 2, kKnots)
    const int32_t* exp2;   // (1025,)
};

struct Draw {
    uint64_t seed;
    uint32_t epoch;
    const int64_t* sample_ids;  // (B,)
};

// One side of the packed batch.
struct Packed {
    int32_t* counts;      // (B, M)
    int32_t* cu_seqlens;  // (B + 1,)
    int64_t* ids;         // (T,)
    int64_t* positions;   // (T,)
    int64_t* modalities;  // (T,)
    int64_t size;         // T
    int64_t fill;         // id in the tail
};

enum class TokenType { u16, i32, i64 };

struct Args {
    const Plan* plan;
    Draw draw;
    int64_t batch;
    const void* tokens;  // (B, L)
    TokenType token_type;
    int64_t tokens_stride;   // elements from a row to the next
    const int64_t* lengths;  // (B, M) or null for full
    Packed inputs, targets;
    int threads;
};

struct Totals {
    int64_t inputs, targets;
    int64_t bad_length;  // index of the first length out of range in (B, M), or -1
};

M4K_DECLARE_LEVELS(Totals, count_tokens, (const Args& args))
M4K_DECLARE_LEVELS(void, fill_tokens, (const Args& args))
M4K_DECLARE_LEVELS(void, select_roles,
                   (const uint32_t* keys, int32_t n, int32_t inputs, int32_t targets, uint8_t* roles))

// First pass: counts and cu_seqlens of both sides.
Totals count_tokens(const Args& args);
// Second pass: ids, positions and modalities, tails included.
void fill_tokens(const Args& args);
// roles (n,) of one modality's n available positions.
void select_roles(const uint32_t* keys, int32_t n, int32_t inputs, int32_t targets, uint8_t* roles);

}  // namespace m4k::masking
