// The kernel of fused.h: a chunk of tokens. Only for *_cpu.cpp files.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "linear_cross_entropy/fused_pack.h"

namespace m4k::M4K_SIMD_NS {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kOne = 1.0f;
// Words of a product's depth at a time: a panel of X stays in L2, and sums stay short.
constexpr int64_t kDepth = 512;

int this_thread() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <typename Kind>
class Chunk {
  public:
    explicit Chunk(const FusedChunk& c)
        : c_(c), a_(c.args), l_(c.layout), width_(c.limit[0]), base_(a_.workspace + l_.row_state) {
        rows_ = {base_, base_ + l_.step, base_ + 2 * l_.step, base_ + 3 * l_.step};
    }

    void run() const {
        const int64_t panels = panels_of(c_.rows);
        const int64_t columns = a_.dweight ? (a_.dim + kPanel - 1) / kPanel : 0;
        const bool gradient = a_.dx || a_.dweight;
#pragma omp parallel num_threads(c_.threads) if (c_.threads > 1)
        {
            float* mine = a_.workspace + l_.thread + this_thread() * l_.per_thread;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < panels + columns; ++i) pack(i, panels);
#pragma omp for schedule(dynamic, 1)
            for (int64_t part = 0; part < l_.parts; ++part) sum_part(part, mine);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < c_.rows; ++row) finish_row(row);
            if (gradient) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t part = 0; part < l_.parts; ++part) differentiate_part(part, mine);
            }
            if (a_.dx) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < (c_.rows + kLanes - 1) / kLanes; ++i) finish_dx(i * kLanes);
            }
        }
    }

  private:
    static int64_t panels_of(int64_t rows) { return (rows + kPanel - 1) / kPanel; }
    // Registers of a panel that hold one of `rows` tokens.
    static int vectors_of(int64_t rows, int64_t panel) {
        const int64_t rest = rows - panel * kPanel;
        return rest > kLanes ? kVectors : 1;
    }

    static int64_t words(int64_t numbers) { return words_of(numbers, Kind::kNumbers); }

    float* x_panel(int64_t panel) const { return a_.workspace + l_.x_panels + panel * kPanel * words(a_.dim); }
    float* x_columns(int64_t first) const { return a_.workspace + l_.x_columns + first * words(c_.rows); }

    void pack(int64_t i, int64_t panels) const {
        if (i < panels) {
            const int64_t first = i * kPanel;
            pack_rows<Kind>(a_.x, c_.order + first, c_.rows - first, a_.dim, vectors_of(c_.rows, i) * kLanes,
                            x_panel(i));
        } else {
            const int64_t panel = i - panels, first = panel * kPanel;
            pack_columns<Kind>(a_.x, c_.order, c_.rows, first, std::min<int64_t>(a_.dim - first, kPanel),
                               vectors_of(a_.dim, panel) * kLanes, x_columns(first));
        }
    }

    // With `along` for `multiply`, with `down` for `x_gradient`.
    WeightBlock weight_block(int64_t block, bool along, bool down, float* mine) const {
        const int64_t first = block * l_.block, classes = std::min(l_.block, width_ - first);
        if (l_.along_step == 0) {
            const float* rows = static_cast<const float*>(a_.weight.data) + first * a_.weight.row;
            return {rows, a_.weight.row, rows, a_.weight.row, first, classes};
        }
        constexpr bool shared = Kind::kNumbers == 1;  // one copy serves both
        float *rows = mine + l_.thread_along, *pairs = shared ? rows : mine + l_.thread_down;
        copy_weight<Kind>(a_.weight, first, classes, a_.dim, along || shared ? rows : nullptr, l_.along_step,
                          down && !shared ? pairs : nullptr, l_.down_step);
        return {rows, l_.along_step, pairs, shared ? l_.along_step : l_.down_step, first, classes};
    }

    // z[v, j] = weight[v] · x of token j of the panel, rows of kPanel.
    void multiply(const WeightBlock& w, int64_t panel, int vectors, float* z) const {
        const int64_t x_step = vectors_of(c_.rows, panel) * kLanes, depth = words(a_.dim);
        const Blocks tiles(static_cast<int>(w.classes));
        for (int64_t first = 0; first < depth || first == 0; first += kDepth) {
            const float* x = x_panel(panel) + first * x_step;
            const int64_t some = std::min(depth - first, kDepth);
            for (int i = 0, v = 0; i < tiles.count; v += tiles.rows(i++)) {
                const Product product{w.along + v * w.along_step + first,
                                      w.along_step,
                                      1,
                                      x,
                                      x_step,
                                      z + v * kPanel,
                                      kPanel,
                                      some,
                                      &kOne,
                                      0};
                if (first == 0) {
                    run_block<false, Kind>(tiles.rows(i), vectors, product);
                } else {
                    run_block<true, Kind>(tiles.rows(i), vectors, product);
                }
            }
        }
    }

    // Number of lanes, of those from `row` on, whose tokens can be of class v: the first ones.
    int lanes_of(int64_t row, int64_t v, int lanes) const {
        while (lanes > 0 && c_.limit[row + lanes - 1] <= v) --lanes;
        return lanes;
    }

    // Puts `value` where a token cannot be of the class.
    void mask(const WeightBlock& w, int64_t row, float* z, int64_t step, float value) const {
        if (c_.limit[row + kLanes - 1] >= w.first + w.classes) return;
        int lanes = kLanes;
        for (int64_t v = 0; v < w.classes; ++v) {
            lanes = lanes_of(row, w.first + v, lanes);
            store(z + v * step, first_lanes(load(z + v * step), lanes, splat(value)));
        }
    }

    // The targets of a block, in the order of their tokens; a cursor that only goes ahead.
    struct Targets {
        const Chunk& chunk;
        int64_t next, end;
        Targets(const Chunk& c, int64_t block)
            : chunk(c), next(c.c_.block_begin[block]), end(c.c_.block_begin[block + 1]) {}
        // The next token of the panel with a target in the block, or -1.
        int64_t take(int64_t panel) {
            if (next == end || chunk.c_.target_rows[next] >= (panel + 1) * kPanel) return -1;
            return chunk.c_.target_rows[next++];
        }
    };

    int64_t target(int64_t row) const { return a_.targets[c_.order[row]]; }

    // First sweep. Of every token: maximum, Σ exp(z - maximum), block of the maximum.
    void sum_part(int64_t part, float* mine) const {
        float* tops = a_.workspace + l_.part_state + 3 * part * l_.step;
        float* sums = tops + l_.step;
        int32_t* best = reinterpret_cast<int32_t*>(sums + l_.step);
        for (int64_t i = 0; i < l_.step; ++i) tops[i] = -kInfinity, sums[i] = 0.0f, best[i] = -1;
        for (int64_t block = c_.part_begin[part]; block < c_.part_begin[part + 1]; ++block) {
            const WeightBlock w = weight_block(block, true, false, mine);
            Targets targets(*this, block);
            for (int64_t panel = 0; panel < panels_of(c_.active[block]); ++panel) {
                const int vectors = vectors_of(c_.active[block], panel);
                multiply(w, panel, vectors, mine);
                float* kept = kept_logits(block, panel, w.classes);
                for (int n = 0; n < vectors; ++n) {
                    const int64_t row = panel * kPanel + n * kLanes;
                    float* z = mine + n * kLanes;
                    mask(w, row, z, kPanel, -kInfinity);
                    take_logits(z, w.classes, static_cast<int32_t>(block), tops + row, sums + row, best + row,
                                kept ? kept + n * kLanes : nullptr, vectors * kLanes);
                }
                for (int64_t row; (row = targets.take(panel)) >= 0;) look_at_target(row, w, mine);
            }
        }
        stream_end();
    }

    float* kept_logits(int64_t block, int64_t panel, int64_t classes) const {
        return c_.kept[block] < 0 ? nullptr : a_.workspace + c_.kept[block] + panel * kPanel * classes;
    }

    // Takes the logits of kLanes tokens, z[v * kPanel], into their running softmax, and stores them where `kept` says.
    static void take_logits(const float* z, int64_t classes, int32_t block, float* tops, float* sums, int32_t* best,
                            float* kept, int64_t kept_step) {
        vfloat highest = splat(-kInfinity);
        for (int64_t v = 0; v < classes; ++v) highest = vmax(load(z + v * kPanel), highest);
        const vfloat before = load(tops), top = vmax(highest, before);
        const vfloat shift = vmax(top, splat(kLowest));  // -inf - -inf is NaN
        vfloat s[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
        int64_t v = 0;
        for (; v + 4 <= classes; v += 4) {
            for (int i = 0; i < 4; ++i) {
                const vfloat logit = load(z + (v + i) * kPanel);
                if (kept) stream(kept + (v + i) * kept_step, logit);
                s[i] = s[i] + vexp(logit - shift);
            }
        }
        for (; v < classes; ++v) {
            const vfloat logit = load(z + v * kPanel);
            if (kept) stream(kept + v * kept_step, logit);
            s[0] = s[0] + vexp(logit - shift);
        }
        store(sums, fma(load(sums), vexp(before - shift), (s[0] + s[1]) + (s[2] + s[3])));
        float high[kLanes], old[kLanes];
        store(high, highest);
        store(old, before);
        for (int j = 0; j < kLanes; ++j) best[j] = high[j] > old[j] ? block : best[j];
        store(tops, top);
    }

    // z: the panel's logits, rows of kPanel.
    void look_at_target(int64_t row, const WeightBlock& w, const float* z) const {
        const int64_t column = row % kPanel, v = target(row) - w.first;
        const float logit = z[v * kPanel + column];
        rows_.target_logit[row] = logit;
        bool first = true;
        for (int64_t u = 0; u < v; ++u) first &= z[u * kPanel + column] != logit;
        c_.first[row] = first;
    }

    // Brings the parts' sums of a token together.
    void finish_row(int64_t row) const {
        const float* tops = a_.workspace + l_.part_state + row;
        const float* sums = tops + l_.step;
        const int32_t* best = reinterpret_cast<const int32_t*>(sums + l_.step);
        const int64_t step = 3 * l_.step;
        float top = -kInfinity, total = 0.0f;
        int32_t block = -1;
        for (int64_t p = 0; p < l_.parts; ++p) {
            if (tops[p * step] > top) top = tops[p * step], block = best[p * step];
        }
        for (int64_t p = 0; p < l_.parts; ++p) {
            const float t = tops[p * step], s = sums[p * step];
            total += t == -kInfinity ? s : s * ::expf(t - top);  // s is 0 or NaN there
        }
        const int64_t token = c_.order[row];
        const float logit = rows_.target_logit[row], scale = c_.scale[row];
        a_.nll[token] = ::logf(total) - (logit - top);
        a_.correct[token] = logit == top && c_.first[row] && block == target(row) / l_.block && total == total;
        rows_.top[row] = top;
        rows_.factor[row] = scale / total;
        rows_.target_gradient[row] = (::expf(logit - top) / total - 1.0f) * scale;
    }

    // Second sweep: the part's share of d x, and its rows of d weight.
    void differentiate_part(int64_t part, float* mine) const {
        float* dx = a_.workspace + l_.dx_parts + part * a_.dim * l_.step;
        float* gradient = mine + l_.thread_gradient;
        for (int64_t block = c_.part_begin[part]; block < c_.part_begin[part + 1]; ++block) {
            const int64_t active = c_.active[block];
            if (active == 0) continue;
            const WeightBlock w = weight_block(block, c_.kept[block] < 0, a_.dx != nullptr, mine);
            Targets targets(*this, block);
            for (int64_t panel = 0; panel < panels_of(active); ++panel) gradient_panel(w, block, panel, targets, mine);
            if (a_.dweight) weight_gradient(w, active, gradient, mine + l_.thread_tail);
            if (!a_.dx) continue;
            const float* down = Kind::kNumbers == 1 ? gradient : mine + l_.thread_gradient_down;
            if (block == c_.part_begin[part]) {
                x_gradient<false>(w, active, down, dx);
            } else {
                x_gradient<true>(w, active, down, dx);
            }
        }
    }

    // Gradients of the block's logits: floats in rows of l_.step; pairs along these rows, and down their columns.
    void gradient_panel(const WeightBlock& w, int64_t block, int64_t panel, Targets& targets, float* mine) const {
        constexpr bool in_place = Kind::kNumbers == 1;
        const int vectors = vectors_of(c_.active[block], panel);
        const float* z = kept_logits(block, panel, w.classes);
        if (z == nullptr) multiply(w, panel, vectors, mine);
        const int64_t first = panel * kPanel, z_step = z ? vectors * kLanes : kPanel;
        float* to = in_place ? mine + l_.thread_gradient + first : mine;
        const int64_t step = in_place ? l_.step : kPanel;
        for (int n = 0; n < vectors; ++n) {
            const int64_t row = first + n * kLanes;
            softmax((z ? z : mine) + n * kLanes, z_step, w.classes, row, to + n * kLanes, step);
            mask(w, row, to + n * kLanes, step, 0.0f);
        }
        for (int64_t row; (row = targets.take(panel)) >= 0;) {
            to[(target(row) - w.first) * step + row - first] = rows_.target_gradient[row];
        }
        if constexpr (!in_place) {
            for (int64_t v = 0; v < w.classes; ++v) {
                float* numbers = to + v * kPanel;
                for (int n = 0; n < vectors; ++n) store(numbers + n * kLanes, round_bf16(load(numbers + n * kLanes)));
                pack_along<Kind>(numbers, vectors * kLanes,
                                 mine + l_.thread_gradient + (v * l_.step + first) / Kind::kNumbers);
            }
            if (!a_.dx) return;
            pack_down<Kind>(to, kPanel, w.classes, vectors, mine + l_.thread_gradient_down + first, l_.step);
        }
    }

    // to[v * step] = factor · exp(z[v] - top) of kLanes tokens. Beyond the last token nothing was summed; `mask` clears
    // what comes out there.
    void softmax(const float* z, int64_t z_step, int64_t classes, int64_t row, float* to, int64_t step) const {
        const vfloat top = load(rows_.top + row), factor = load(rows_.factor + row);
#pragma GCC unroll 4
        for (int64_t v = 0; v < classes; ++v) store(to + v * step, vexp(load(z + v * z_step) - top) * factor);
    }

    // d weight of the block = (or +=) gradient (classes, active) · X (active, dim).
    void weight_gradient(const WeightBlock& w, int64_t active, const float* gradient, float* tail) const {
        c_.add ? weight_gradient_as<true>(w, active, gradient, tail)
               : weight_gradient_as<false>(w, active, gradient, tail);
    }

    template <bool Add>
    void weight_gradient_as(const WeightBlock& w, int64_t active, const float* gradient, float* tail) const {
        const Blocks tiles(static_cast<int>(w.classes));
        for (int64_t first = 0; first < a_.dim; first += kPanel) {
            const int vectors = vectors_of(a_.dim, first / kPanel);
            const int64_t columns = std::min<int64_t>(a_.dim - first, kPanel);
            const float* x = x_columns(first);
            for (int i = 0, v = 0; i < tiles.count; v += tiles.rows(i++)) {
                const int rows = tiles.rows(i);
                float* to = a_.dweight + (w.first + v) * a_.dim + first;
                const Product product{gradient + v * words(l_.step),
                                      words(l_.step),
                                      1,
                                      x,
                                      vectors * kLanes,
                                      to,
                                      a_.dim,
                                      words(active),
                                      &kOne,
                                      0};
                if (columns == vectors * kLanes) {
                    run_block<Add, Kind>(rows, vectors, product);
                    continue;
                }
                Product beside = product;
                beside.c = tail;
                beside.c_row = kPanel;
                run_block<false, Kind>(rows, vectors, beside);
                for (int r = 0; r < rows; ++r) {
                    for (int64_t j = 0; j < columns; ++j) {
                        float& element = to[r * a_.dim + j];
                        element = Add ? element + tail[r * kPanel + j] : tail[r * kPanel + j];
                    }
                }
            }
        }
    }

    // dx (dim, active) = (or +=) weight (classes, dim)^T · gradient (classes, active).
    template <bool Add>
    void x_gradient(const WeightBlock& w, int64_t active, const float* gradient, float* dx) const {
        const Blocks tiles(static_cast<int>(a_.dim));
        for (int64_t panel = 0; panel < panels_of(active); ++panel) {
            const int vectors = vectors_of(active, panel);
            const int64_t row = panel * kPanel;
            for (int i = 0, d = 0; i < tiles.count; d += tiles.rows(i++)) {
                run_block<Add, Kind>(tiles.rows(i), vectors,
                                     {w.down + d, 1, w.down_step, gradient + row, l_.step, dx + d * l_.step + row,
                                      l_.step, words(w.classes), &kOne, 0});
            }
        }
    }

    // d x of kLanes tokens: the parts' sums, in order.
    void finish_dx(int64_t row) const {
        const int64_t size = a_.dim * l_.step;
        const float* parts = a_.workspace + l_.dx_parts + row;
        int64_t touched = 0;  // parts whose first block, the one with the most tokens, concerns these
        while (touched < l_.parts && c_.part_begin[touched] < l_.blocks && c_.active[c_.part_begin[touched]] > row) {
            ++touched;
        }
        const int64_t lanes = std::min<int64_t>(kLanes, c_.rows - row);
        for (int64_t d = 0; d < a_.dim; ++d) {
            vfloat sum = load(parts + d * l_.step);
            for (int64_t p = 1; p < touched; ++p) sum = sum + load(parts + p * size + d * l_.step);
            float values[kLanes];
            store(values, sum);
            for (int64_t j = 0; j < lanes; ++j) a_.dx[c_.order[row + j] * a_.dim + d] = values[j];
        }
    }

    const FusedChunk& c_;
    const FusedArgs& a_;
    const FusedLayout& l_;
    int64_t width_;  // classes
    float* base_;
    FusedRows rows_;
};

}  // namespace

}  // namespace m4k::M4K_SIMD_NS
