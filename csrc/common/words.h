// Brings matrices into the words that the products read: floats, or pairs of bfloat16 along the depth. Only for
// *_cpu.cpp files.
#pragma once

#include "common/gelu.h"
#include "common/matrix.h"
#include "common/microkernel.h"
#include "common/pack.h"

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

M4K_INLINE void gelu_numbers(int64_t count, bool round, float* x) {
    for (int64_t i = 0; i < count; i += kLanes) {
        float lanes[kLanes] = {};
        const bool whole = i + kLanes <= count;
        if (!whole) std::memcpy(lanes, x + i, (count - i) * sizeof(float));
        float* at = whole ? x + i : lanes;
        const vfloat value = gelu(load(at));
        store(at, round ? round_bf16(value) : value);
        if (!whole) std::memcpy(x + i, lanes, (count - i) * sizeof(float));
    }
}

// `count` numbers of a row from `column` on, as the source says that they are to be read; zeros up to `padded`.
M4K_INLINE void load_numbers(const MatrixSource& from, int64_t row, int64_t column, int64_t count, int64_t padded,
                             float* to) {
    const int64_t at = from.offset(row, column);
    if (from.is_bf16) {
        load_numbers_as<false>(static_cast<const uint16_t*>(from.data) + at, from.column, count, to);
    } else if (from.round && !from.gelu) {
        load_numbers_as<true>(static_cast<const float*>(from.data) + at, from.column, count, to);
    } else {
        load_numbers_as<false>(static_cast<const float*>(from.data) + at, from.column, count, to);
    }
    if (from.gelu) gelu_numbers(count, from.round, to);
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

M4K_INLINE int64_t row_of(const int64_t* order, int64_t i) { return order ? order[i] : i; }

// Numbers brought along at a time; even, so that pairs stay together.
inline constexpr int64_t kPiece = 128;

// Whether a row of the matrix holds the words of Kind as they lie in memory, `dim` numbers of it.
template <typename Kind>
M4K_INLINE bool holds_words(const MatrixSource& x, int64_t dim) {
    if (x.column != 1 || x.gelu) return false;
    if constexpr (Kind::kNumbers == 2) return x.is_bf16 && x.row % 2 == 0 && dim % 2 == 0;
    return !x.is_bf16 && !x.round;
}

// A panel of X transposed: (words of dim, width) of `width` rows, whole registers of them, 0 beyond the last; of the
// rows that `order` names, where it is not null.
template <typename Kind>
static void pack_rows(const MatrixSource& x, const int64_t* order, int64_t rows, int64_t dim, int64_t width,
                      float* to) {
    constexpr int64_t kWords = kPiece / Kind::kNumbers;
    alignas(64) float numbers[kPiece], words[kLanes * kWords], tail[4 * kLanes];
    const bool as_it_lies = order == nullptr && holds_words<Kind>(x, dim);
    for (int64_t lane = 0; lane < width; lane += kLanes) {
        for (int64_t d = 0; d < dim; d += kPiece) {
            const int64_t count = dim - d < kPiece ? dim - d : kPiece, padded = round_up(count, kLanes);
            const int64_t some = words_of(count, Kind::kNumbers);
            const float* from = words;
            int64_t step = kWords;
            if (as_it_lies && lane + kLanes <= rows && some % 4 == 0) {
                from = static_cast<const float*>(x.at(lane, d).data);
                step = x.row / Kind::kNumbers;
            } else {
                for (int64_t j = 0; j < kLanes; ++j) {
                    const bool is_row = lane + j < rows;
                    load_numbers(x, is_row ? row_of(order, lane + j) : 0, d, is_row ? count : 0, padded, numbers);
                    pack_along<Kind>(numbers, padded, words + j * kWords);
                }
            }
            float* at = to + d / Kind::kNumbers * width + lane;
            int64_t i = 0;
            for (; i + 4 <= some; i += 4) transpose_four(from + i, step, at + i * width, width);
            if (i == some) continue;
            transpose_four(from + i, step, tail, kLanes);
            for (int64_t w = 0; i < some; ++i, ++w) store(at + i * width, load(tail + w * kLanes));
        }
    }
}

template <bool Round, typename T>
M4K_INLINE vfloat read_register(const T* p, bool as_gelu) {
    vfloat value = load_register(p);
    if (as_gelu) value = gelu(value);
    return Round ? round_bf16(value) : value;
}

// The whole registers of rows of X, a column's number in a lane.
template <typename Kind, bool Round, typename T>
M4K_INLINE void pack_whole_columns(const T* from, int64_t row, bool as_gelu, int64_t rows, int64_t width, float* to) {
    for (int64_t r = 0; r < rows; r += Kind::kNumbers, from += Kind::kNumbers * row, to += width) {
        for (int64_t j = 0; j < width; j += kLanes) {
            vfloat value = read_register<Round>(from + j, as_gelu);
            if constexpr (Kind::kNumbers == 2) {
                value = pair_bf16(value, r + 1 < rows ? read_register<Round>(from + row + j, as_gelu) : splat(0.0f));
            }
            store(to + j, value);
        }
    }
}

// A panel of X: (words of rows, width) of the columns from `column` on, 0 beyond the last; of the rows that `order`
// names, where it is not null.
template <typename Kind>
static void pack_columns(const MatrixSource& x, const int64_t* order, int64_t rows, int64_t column, int64_t count,
                         int64_t width, float* to) {
    if (order == nullptr && x.column == 1 && count >= width) {
        const void* from = x.at(0, column).data;
        if (x.is_bf16 && !x.gelu) {
            pack_whole_columns<Kind, false>(static_cast<const uint16_t*>(from), x.row, false, rows, width, to);
        } else if (x.is_bf16) {
            pack_whole_columns<Kind, true>(static_cast<const uint16_t*>(from), x.row, true, rows, width, to);
        } else if (x.round) {
            pack_whole_columns<Kind, true>(static_cast<const float*>(from), x.row, x.gelu, rows, width, to);
        } else {
            pack_whole_columns<Kind, false>(static_cast<const float*>(from), x.row, x.gelu, rows, width, to);
        }
        return;
    }
    alignas(64) float numbers[kPiece * kPanel];
    for (int64_t first = 0; first < rows; first += kPiece) {
        const int64_t some = rows - first < kPiece ? rows - first : kPiece;
        for (int64_t r = 0; r < some; ++r) {
            load_numbers(x, row_of(order, first + r), column, count < width ? count : width, width,
                         numbers + r * width);
        }
        pack_down<Kind>(numbers, width, some, static_cast<int>(width / kLanes), to + first / Kind::kNumbers * width,
                        width);
    }
}

}  // namespace m4k::M4K_SIMD_NS
