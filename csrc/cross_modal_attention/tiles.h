// Bringing heads of a sample into the form that the register blocks read: rows of whole registers, and panels of
// transposed rows. Only for *_cpu.cpp files.
#pragma once

#include <type_traits>

#include "common/microkernel.h"
#include "common/pack.h"
#include "cross_modal_attention/cross_modal_attention.h"

namespace m4k::M4K_SIMD_NS {

template <typename T>
M4K_INLINE T* at(const Heads<T>& x, int64_t token, int64_t head) {
    return x.data + token * x.token + head * x.head;
}

// Hands out the pieces of one thread's workspace, each aligned to 64 bytes.
struct Arena {
    float* next;
    M4K_INLINE_MEMBER float* take(int64_t floats) {
        float* piece = next;
        next += round_up(floats, 16);
        return piece;
    }
};

// Row i at data + i * step.
struct Rows {
    const float* data;
    int64_t step;
};

// One head's row as float, zero from `dim` to `padded`, a multiple of kLanes.
M4K_INLINE void load_row(const float* from, int dim, int64_t padded, float* to) {
    std::memcpy(to, from, sizeof(float) * dim);
    for (int64_t d = dim; d < padded; ++d) to[d] = 0.0f;
}

M4K_INLINE void load_row(const uint16_t* from, int dim, int64_t padded, float* to) {
    int d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load_bf16(from + d));
    for (; d < dim; ++d) {
        const uint32_t bits = uint32_t{from[d]} << 16;
        std::memcpy(to + d, &bits, sizeof bits);
    }
    for (; d < padded; ++d) to[d] = 0.0f;
}

M4K_INLINE void store_row(const float* from, int dim, float* to) { std::memcpy(to, from, sizeof(float) * dim); }

// To bfloat16, half to even; a NaN stays one.
M4K_INLINE void store_row(const float* from, int dim, uint16_t* to) {
    for (int d = 0; d < dim; ++d) {
        uint32_t bits;
        std::memcpy(&bits, from + d, sizeof bits);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        to[d] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
    }
}

// Whether the register blocks can read and write the tensor itself, row by row.
template <typename T>
M4K_INLINE bool is_direct(int dim) {
    return std::is_same_v<std::remove_const_t<T>, float> && dim % kLanes == 0;
}

// Rows [first, first + count) of a head in whole registers: the tensor itself, or a copy in `buffer`.
template <typename T>
M4K_INLINE Rows whole_rows(const Heads<const T>& x, int64_t first, int64_t count, int64_t head, int dim,
                           float* buffer) {
    if constexpr (std::is_same_v<T, float>) {
        if (is_direct<T>(dim)) return {at(x, first, head), x.token};
    }
    const int64_t padded = round_up(dim, kLanes);
    for (int64_t i = 0; i < count; ++i) load_row(at(x, first + i, head), dim, padded, buffer + i * padded);
    return {buffer, padded};
}

// Asks for rows of a head before they are needed. A head's rows lie far apart (in a fused projection each in a page of
// its own), so no hardware prefetcher finds them; without this a batch larger than the cache takes half as long again.
template <bool Write, typename T>
M4K_INLINE void prefetch_rows(const Heads<T>& x, int64_t first, int64_t count, int64_t head, int dim) {
    for (int64_t i = 0; i < count; ++i) {
        const char* row = reinterpret_cast<const char*>(at(x, first + i, head));
        for (int64_t byte = 0; byte < int64_t{dim} * static_cast<int64_t>(sizeof(T)); byte += 64) {
            __builtin_prefetch(row + byte, Write, 2);
        }
    }
}

// Keys of one group that a query attends to.
struct Span {
    int32_t key;     // the first, counted from the sample's first key
    int32_t length;  // number of keys
    int32_t column;  // of the scores and panels where they begin; a multiple of kLanes
    int32_t group;
};

// Panels of kPanel columns, the last of a span kLanes if that is enough; the panel at column c begins at
// `panels + c * dim` and holds dim rows of its width. Columns without a key are 0.
M4K_INLINE int panel_width(const Span& span, int column) { return span.length - column > kLanes ? kPanel : kLanes; }

// Packs the rows of one head that belong to the span.
template <typename T>
static void pack_panels(const Heads<const T>& x, int64_t first_token, int64_t head, int dim, const Span& span,
                        float* panels, float* scratch) {
    const int64_t padded = round_up(dim, kLanes);
    for (int column = 0; column < span.length; column += kLanes) {
        const int start = column / kPanel * kPanel, width = panel_width(span, start);
        float* to = panels + int64_t{span.column + start} * dim + (column - start);
        const int keys = span.length - column < kLanes ? span.length - column : kLanes;
        const int64_t token = first_token + span.key + column;
        Rows rows{scratch, padded};
        if constexpr (std::is_same_v<T, float>) {
            if (keys == kLanes) rows = {at(x, token, head), x.token};
        }
        if (rows.data == scratch) {
            for (int j = 0; j < kLanes; ++j) {
                if (j < keys) {
                    load_row(at(x, token + j, head), dim, padded, scratch + j * padded);
                } else {
                    std::memset(scratch + j * padded, 0, sizeof(float) * padded);
                }
            }
        }
        int d = 0;
        for (; d + 4 <= dim; d += 4) transpose_four(rows.data + d, rows.step, to + int64_t{d} * width, width);
        for (; d < dim; ++d) {
            for (int j = 0; j < kLanes; ++j) to[int64_t{d} * width + j] = rows.data[j * rows.step + d];
        }
    }
}

// scores[i, column] = scale * sum over d of a[i, d] * panel[d, column], for the span's columns.
M4K_INLINE void span_scores(int rows, const float* a, int64_t a_row, int dim, const Span& span, const float* panels,
                            float* scores, int64_t scores_row, const float* scale) {
    for (int column = 0; column < span.length; column += kPanel) {
        const int width = panel_width(span, column);
        const int64_t begin = span.column + column;
        run_block<false>(rows, width / kLanes,
                         {a, a_row, 1, panels + begin * dim, width, scores + begin, scores_row, dim, scale, 0});
    }
}

// The groups of a sample that query group `group` attends to, or with -1 all of them; returns their number.
M4K_INLINE int list_spans(const AttentionPlan& plan, int64_t sample, int group, Span* spans) {
    const int32_t* bounds = plan.k_bounds + sample * (plan.k_groups + 1);
    int count = 0, column = 0;
    for (int g = 0; g < plan.k_groups; ++g) {
        const int length = bounds[g + 1] - bounds[g];
        if (length > 0 && (group < 0 || plan.allowed[group * plan.k_groups + g])) {
            spans[count++] = {bounds[g] - bounds[0], length, column, g};
        }
        column += static_cast<int>(round_up(length, kLanes));
    }
    return count;
}

}  // namespace m4k::M4K_SIMD_NS
