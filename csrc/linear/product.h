// The kernel of linear.h. Only for *_cpu.cpp files.
#pragma once

#include <algorithm>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/words.h"
#include "linear/linear.h"

namespace m4k::M4K_SIMD_NS {
namespace {

constexpr float kOne = 1.0f;

template <typename Kind>
class LinearProduct {
  public:
    LinearProduct(const LinearArgs& args, const LinearLayout& layout) : a_(args), l_(layout) {}

    void run() const {
#pragma omp parallel num_threads(l_.threads) if (l_.threads > 1)
        {
#if defined(_OPENMP)
            float* mine = a_.workspace + l_.thread + omp_get_thread_num() * l_.per_thread;
#else
            float* mine = a_.workspace + l_.thread;
#endif
            for (int64_t first = 0; first < a_.columns; first += l_.block) {
                const int64_t columns = std::min(l_.block, a_.columns - first);
#pragma omp for schedule(dynamic, 1)
                for (int64_t panel = 0; panel < (columns + kPanel - 1) / kPanel; ++panel) {
                    pack_panel(first, columns, panel);
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < l_.row_tasks * l_.column_tasks; ++i) {
                    run_task(first, columns, i / l_.column_tasks, i % l_.column_tasks, mine);
                }
            }
        }
    }

  private:
    // Floats of a tile's word: one register where that holds the rows of a register block.
    static constexpr int64_t kTile = (kRows + kLanes - 1) / kLanes * kLanes;
    static_assert((LinearLayout::kTaskRows + kRows - 1) / kRows * kTile <= LinearLayout::kTileFloats);

    // Registers of a panel that hold one of `columns` columns.
    static int vectors_of(int64_t columns, int64_t panel) { return columns - panel * kPanel > kLanes ? kVectors : 1; }

    float* panel_at(int64_t panel) const { return a_.workspace + panel * kPanel * l_.words; }

    void pack_panel(int64_t first, int64_t columns, int64_t panel) const {
        const int64_t column = first + panel * kPanel, width = vectors_of(columns, panel) * kLanes;
        const int64_t some = std::min<int64_t>(kPanel, columns - panel * kPanel);
        if (a_.b.row == 1) {
            pack_rows<Kind>(a_.b.transposed().at(column, 0), nullptr, some, a_.depth, width, panel_at(panel));
        } else {
            pack_columns<Kind>(a_.b, nullptr, a_.depth, column, some, width, panel_at(panel));
        }
    }

    // The rows from `row` on, the slab's words from `word` on: tile[w * kTile + i]. A tile's last lanes hold rows of
    // the next one, which nobody reads: whole registers are packed faster.
    void pack_tile(int64_t row, int64_t word, int64_t words, float* tile) const {
        const int64_t count = std::min(kTile, a_.rows - row);
        const int64_t from = word * Kind::kNumbers, some = std::min(words * Kind::kNumbers, a_.depth - from);
        if (a_.a.row == 1) {
            pack_columns<Kind>(a_.a.transposed().at(from, row), nullptr, some, 0, count, kTile, tile);
        } else {
            pack_rows<Kind>(a_.a.at(row, from), nullptr, count, some, kTile, tile);
        }
    }

    // Part `i` of `parts` of n, which differ by one at most.
    static int64_t part(int64_t n, int64_t parts, int64_t i) { return n / parts * i + std::min(i, n % parts); }

    void run_task(int64_t first, int64_t columns, int64_t row_task, int64_t column_task, float* mine) const {
        const int64_t row = part(a_.rows, l_.row_tasks, row_task);
        const int64_t rows = part(a_.rows, l_.row_tasks, row_task + 1) - row;
        const int64_t panels = (columns + kPanel - 1) / kPanel;
        const int64_t begin = part(panels, l_.column_tasks, column_task);
        const int64_t end = part(panels, l_.column_tasks, column_task + 1);
        float *tiles = mine, *sums = mine + LinearLayout::kTileFloats * l_.slab;
        const int64_t step = (end - begin) * kPanel;
        if (step == 0) return;
        const Blocks blocks(static_cast<int>(rows));
        for (int64_t word = 0; word < l_.words || word == 0; word += l_.slab) {
            const int64_t words = std::min(l_.slab, l_.words - word);
            for (int64_t i = 0, r = 0; i < blocks.count; r += blocks.rows(i++)) {
                pack_tile(row + r, word, words, tiles + i * kTile * words);
            }
            for (int64_t panel = begin; panel < end; ++panel) {
                const int vectors = vectors_of(columns, panel);
                const int64_t width = vectors * kLanes;
                const float* b = panel_at(panel) + word * width;
                float* c = sums + (panel - begin) * kPanel;
                for (int64_t i = 0, r = 0; i < blocks.count; r += blocks.rows(i++)) {
                    const Product product{
                        tiles + i * kTile * words, 1, kTile, b, width, c + r * step, step, words, &kOne, 0};
                    if (word == 0) {
                        run_block<false, Kind>(blocks.rows(i), vectors, product);
                    } else {
                        run_block<true, Kind>(blocks.rows(i), vectors, product);
                    }
                }
            }
        }
        const int64_t column = first + begin * kPanel;
        const int64_t width = std::min(columns - begin * kPanel, step);
        for (int64_t r = 0; r < rows; ++r) finish_row(row + r, column, width, sums + r * step);
    }

    // What follows the product, for `width` sums of a row from `column` on.
    void finish_row(int64_t row, int64_t column, int64_t width, float* sums) const {
        if (a_.bias) {
            for (int64_t j = 0; j < width; ++j) sums[j] += a_.bias[column + j];
        }
        alignas(64) float other[kPiece];
        for (int64_t j = 0; (a_.residual.data || a_.slope_at.data) && j < width; j += kPiece) {
            const int64_t count = std::min(kPiece, width - j), padded = round_up(count, kLanes);
            if (a_.residual.data) {
                load_numbers(a_.residual, row, column + j, count, padded, other);
                for (int64_t i = 0; i < padded; i += kLanes) store(sums + j + i, load(sums + j + i) + load(other + i));
            }
            if (a_.slope_at.data) {
                load_numbers(a_.slope_at, row, column + j, count, padded, other);
                for (int64_t i = 0; i < padded; i += kLanes) {
                    store(sums + j + i, load(sums + j + i) * gelu_slope(load(other + i)));
                }
            }
        }
        const int64_t at = row * a_.columns + column;
        if (a_.out_is_bf16) {
            uint16_t* out = static_cast<uint16_t*>(a_.out) + at;
            int64_t j = 0;
            for (; j + kLanes <= width; j += kLanes) store_bf16(out + j, round_bf16(load(sums + j)));
            if (j < width) {
                uint16_t tail[kLanes];
                store_bf16(tail, round_bf16(load(sums + j)));
                std::copy_n(tail, width - j, out + j);
            }
        } else {
            std::copy_n(sums, width, static_cast<float*>(a_.out) + at);
        }
    }

    const LinearArgs& a_;
    const LinearLayout& l_;
};

}  // namespace
}  // namespace m4k::M4K_SIMD_NS
