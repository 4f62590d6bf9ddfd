// Brings rows of x and of the weight into the words that the products read: floats, or pairs of bfloat16. Only for
// *_cpu.cpp files.
#pragma once

#include "common/microkernel.h"
#include "common/pack.h"
#include "linear_cross_entropy/fused.h"

namespace m4k::M4K_SIMD_NS {

M4K_INLINE int64_t words_of(int64_t numbers, int a_word) { return (numbers + a_word - 1) / a_word; }

M4K_INLINE vfloat load_register(const float* p) { return load(p); }
M4K_INLINE vfloat load_register(const uint16_t* p) { return load_bf16(p); }
M4K_INLINE float load_number(const float* p) { return *p; }
M4K_INLINE float load_number(const uint16_t* p) {
    const uint32_t bits = uint32_t{*p} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <bool Round, typename T>
M4K_INLINE void load_numbers_as(const T* from, int64_t step, int64_t count, float* to) {
    int64_t i = 0;
    for (; step == 1 && i + kLanes <= count; i += kLanes) {
        const vfloat value = load_register(from + i);
        store(to + i, Round ? round_bf16(value) : value);
    }
    for (; i < count; ++i) {
        float lanes[kLanes] = {load_number(from + i * step)};
        if (Round) store(lanes, round_bf16(load(lanes)));
        to[i] = lanes[0];
    }
}

// `count` numbers of a row from `column` on, rounded where the source says so; zeros up to `padded`.
M4K_INLINE void load_numbers(const FusedSource& from, int64_t row, int64_t column, int64_t count, int64_t padded,
                             float* to) {
    const int64_t at = row * from.row + column * from.column;
    if (from.is_bf16) {
        load_numbers_as<false>(static_cast<const uint16_t*>(from.data) + at, from.column, count, to);
    } else if (from.round) {
        load_numbers_as<true>(static_cast<const float*>(from.data) + at, from.column, count, to);
    } else {
        load_numbers_as<false>(static_cast<const float*>(from.data) + at, from.column, count, to);
    }
    for (int64_t i = count; i < padded; ++i) to[i] = 0.0f;
}

// Rows of whole registers, each number in a lane of its own, into words along the rows: to[w] = rows w (Floats), or
// 2 w and 2 w + 1 (Bf16Pairs, zeros after an odd last one). `vectors` registers.
template <typename Kind>
M4K_INLINE void pack_down(const float* rows, int64_t step, int64_t count, int vectors, float* to, int64_t to_step) {
    for (int64_t i = 0; i < count; i += Kind::kNumbers, to += to_step) {
        const float* row = rows + i * step;
        for (int n = 0; n < vectors; ++n) {
            vfloat value = load(row + n * kLanes);
            if constexpr (Kind::kNumbers == 2) {
                value = pair_bf16(value, i + 1 < count ? load(row + step + n * kLanes) : splat(0.0f));
            }
            store(to + n * kLanes, value);
        }
    }
}

// A row of `padded` numbers, whole registers, into words along it.
template <typename Kind>
M4K_INLINE void pack_along(const float* row, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += kLanes) {
        if constexpr (Kind::kNumbers == 2) {
            store_bf16(reinterpret_cast<uint16_t*>(to) + i, load(row + i));
        } else {
            store(to + i, load(row + i));
        }
    }
}

// Numbers brought along at a time; even, so that pairs stay together.
inline constexpr int64_t kPiece = 128;

// Panel `panel` of X transposed: (words of dim, width) of `width` tokens, whole registers of them; 0 beyond the last.
template <typename Kind>
static void pack_tokens(const FusedSource& x, const int64_t* order, int64_t rows, int64_t dim, int64_t width,
                        float* to) {
    alignas(64) float numbers[kLanes * kPiece], transposed[kPiece * kLanes];
    for (int64_t lane = 0; lane < width; lane += kLanes) {
        for (int64_t d = 0; d < dim; d += kPiece) {
            const int64_t count = dim - d < kPiece ? dim - d : kPiece, padded = round_up(count, 4);
            for (int64_t j = 0; j < kLanes; ++j) {
                const bool is_token = lane + j < rows;
                load_numbers(x, is_token ? order[lane + j] : 0, d, is_token ? count : 0, padded, numbers + j * kPiece);
            }
            for (int64_t i = 0; i < padded; i += 4) {
                transpose_four(numbers + i, kPiece, transposed + i * kLanes, kLanes);
            }
            pack_down<Kind>(transposed, kLanes, count, 1, to + d / Kind::kNumbers * width + lane, width);
        }
    }
}

// A panel of X: (words of rows, width) of the columns from `column` on; 0 beyond the last.
template <typename Kind>
static void pack_columns(const FusedSource& x, const int64_t* order, int64_t rows, int64_t column, int64_t count,
                         int64_t width, float* to) {
    alignas(64) float numbers[kPiece * kPanel];
    for (int64_t first = 0; first < rows; first += kPiece) {
        const int64_t some = rows - first < kPiece ? rows - first : kPiece;
        for (int64_t r = 0; r < some; ++r) load_numbers(x, order[first + r], column, count, width, numbers + r * width);
        pack_down<Kind>(numbers, width, some, static_cast<int>(width / kLanes), to + first / Kind::kNumbers * width,
                        width);
    }
}

// A block of the weight as the products read it: words along its rows for z = W x, and words down its columns for
// d x = W^T P. Of floats both are the rows.
struct WeightBlock {
    const float* along;
    int64_t along_step;
    const float* down;
    int64_t down_step;
    int64_t first;    // class
    int64_t classes;  // of them
};

// Fills the copies whose addresses are not null; steps in words.
template <typename Kind>
static void copy_weight(const FusedSource& weight, int64_t first, int64_t classes, int64_t dim, float* along,
                        int64_t along_step, float* down, int64_t down_step) {
    alignas(64) float numbers[2 * kPiece];
    for (int64_t v = 0; v < classes; v += Kind::kNumbers) {
        for (int64_t d = 0; d < dim; d += kPiece) {
            const int64_t count = dim - d < kPiece ? dim - d : kPiece, padded = round_up(count, kLanes);
            const int64_t some = classes - v < Kind::kNumbers ? classes - v : Kind::kNumbers;
            for (int64_t i = 0; i < some; ++i) {
                load_numbers(weight, first + v + i, d, count, padded, numbers + i * kPiece);
                if (!along) continue;
                pack_along<Kind>(numbers + i * kPiece, padded, along + (v + i) * along_step + d / Kind::kNumbers);
            }
            if (!down) continue;
            pack_down<Kind>(numbers, kPiece, some, static_cast<int>(padded / kLanes),
                            down + v / Kind::kNumbers * down_step + d, down_step);
        }
    }
}

}  // namespace m4k::M4K_SIMD_NS
