// How a call of the fused kernel is divided: chunks of tokens, blocks and parts of classes, and the workspace.
#include "linear_cross_entropy/fused.h"

#include <algorithm>
#include <memory>

namespace m4k {
namespace {

constexpr int64_t kUnit = FusedLayout::kUnit;
// Parts of the classes: enough to even out two threads' speeds, few enough that their sums of d x are small beside the
// logits.
constexpr int kParts = 16;
// Classes of a block: a multiple of every level's kRows. A block of the weight and one of the gradients stay in L2.
constexpr int64_t kBlock = 126, kNarrowBlock = 42, kWideDim = 1024;
// Tokens of a chunk: a block of gradients stays in L2, and logits and sums of d x together are no more than the logits
// of the library's chunks.
constexpr int64_t kMaxRows = 448;
// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 200000;

int64_t units(int64_t n) { return (n + kUnit - 1) / kUnit; }
int64_t padded(int64_t n) { return units(n) * kUnit; }
int64_t odd_lines(int64_t n) { return (units(n) | 1) * kUnit; }

int useful_threads(int64_t work, int threads) {
    return static_cast<int>(std::clamp<int64_t>(work / kMinWorkPerThread, 1, threads));
}

FusedSize size_of(const FusedArgs& a) {
    return {a.dim,
            a.classes,
            a.dx != nullptr,
            a.dweight != nullptr,
            copies_weight(a.weight, a.bf16_products),
            a.bf16_products,
            useful_threads(a.count * a.classes * a.dim, a.threads)};
}

}  // namespace

// Rows whose distance is a large power of two share one set of the L1 cache.
bool copies_weight(const FusedSource& w, bool bf16_products) {
    return bf16_products || w.is_bf16 || w.round || w.column != 1 || w.row * 4 % 2048 == 0;
}

FusedLayout::FusedLayout(int64_t rows, const FusedSize& s)
    : step(odd_lines(rows)),
      block(s.dim > kWideDim ? kNarrowBlock : kBlock),
      blocks((s.classes + block - 1) / block),
      parts(std::min<int64_t>(blocks, std::max(kParts, s.threads))) {
    const int a_word = s.bf16_products ? 2 : 1;
    const auto words = [a_word](int64_t numbers) { return (numbers + a_word - 1) / a_word; };
    along_step = s.copies_weight ? odd_lines(words(padded(s.dim))) : 0;
    down_step = s.bf16_products ? odd_lines(s.dim) : 0;
    int64_t next = 0;
    const auto take = [&next](int64_t floats) {
        const int64_t at = next;
        next += padded(floats);
        return at;
    };
    x_panels = take(padded(rows) * words(s.dim));
    x_columns = take(s.dweight ? padded(s.dim) * words(rows) : 0);
    part_state = take(3 * parts * step);
    row_state = take(4 * step);
    dx_parts = take(s.dx ? parts * s.dim * step : 0);
    thread = next;
    take(block * kPanel);
    const bool gradient = s.dx || s.dweight;
    thread_along = take(block * along_step) - thread;
    thread_down = take(s.dx ? words(block) * down_step : 0) - thread;
    thread_gradient = take(gradient ? block * words(step) : 0) - thread;
    thread_gradient_down = take(s.dx && s.bf16_products ? words(block) * step : 0) - thread;
    thread_tail = take(s.dweight ? kUnit * kPanel : 0) - thread;
    per_thread = next - thread;
    logits = thread + s.threads * per_thread;
}

FusedPlan plan_fused(int64_t count, FusedSize size, int64_t floats) {
    if (count == 0) return {1, 0, 0};
    size.threads = useful_threads(count * size.classes * size.dim, size.threads);
    for (int64_t most = kMaxRows; most >= kUnit; most /= 2) {
        const int64_t chunks = (count + most - 1) / most;
        const int64_t rows = chunks == 1 ? count : padded((count + chunks - 1) / chunks);
        const FusedLayout layout(rows, size);
        if (layout.logits > floats) continue;
        const int64_t all = size.dx || size.dweight ? padded(rows) * (size.classes + layout.block) : 0;
        const int64_t kept = std::min(floats - layout.logits, all);
        return {rows, layout.logits + kept, kept};
    }
    return {0, 0, 0};
}

namespace {

struct Divided {
    std::vector<int64_t> limit, active, kept, part_begin, block_begin, target_rows;
    std::unique_ptr<bool[]> first;
};

Divided divide(const FusedArgs& a, const FusedLayout& layout, int64_t first, int64_t rows) {
    Divided d;
    d.limit.assign(layout.step, 0);
    std::copy_n(a.tokens.limit + first, rows, d.limit.begin());
    int64_t active = rows, next = layout.logits, work = 0;
    const bool gradient = a.dx != nullptr || a.dweight != nullptr;
    for (int64_t b = 0; b < layout.blocks; ++b) {
        while (active > 0 && d.limit[active - 1] <= b * layout.block) --active;
        d.active.push_back(active);
        work += padded(active);
        const int64_t size = padded(active) * layout.block;
        const bool fits = gradient && next + size <= a.floats;
        d.kept.push_back(fits ? next : -1);
        next += fits ? size : 0;
    }
    int64_t done = 0;
    d.part_begin.push_back(0);
    for (int64_t b = 0; b < layout.blocks; ++b) {
        done += padded(d.active[b]);
        const int64_t closed = static_cast<int64_t>(d.part_begin.size());
        if (b + 1 < layout.blocks && closed < layout.parts && done * layout.parts >= work * closed) {
            d.part_begin.push_back(b + 1);
        }
    }
    d.part_begin.resize(layout.parts + 1, layout.blocks);
    d.block_begin.assign(layout.blocks + 1, 0);
    const auto block_of = [&](int64_t row) { return a.targets[a.tokens.order[first + row]] / layout.block; };
    for (int64_t r = 0; r < rows; ++r) ++d.block_begin[block_of(r) + 1];
    for (int64_t b = 0; b < layout.blocks; ++b) d.block_begin[b + 1] += d.block_begin[b];
    std::vector<int64_t> place(d.block_begin.begin(), d.block_begin.end() - 1);
    d.target_rows.resize(rows);
    for (int64_t r = 0; r < rows; ++r) d.target_rows[place[block_of(r)]++] = r;
    d.first = std::make_unique<bool[]>(layout.step);
    return d;
}

void run_level(const FusedChunk& chunk) { M4K_CALL_LEVEL(fused_chunk, (chunk)); }
void run_bf16_level(const FusedChunk& chunk) { M4K_CALL_BF16_LEVEL(fused_chunk_bf16, (chunk)); }

}  // namespace

void fused_cross_entropy(const FusedArgs& args, int64_t rows) {
    FusedSize size = size_of(args);
    for (int64_t first = 0; first < args.count; first += rows) {
        const int64_t n = std::min(rows, args.count - first);
        size.classes = args.tokens.limit[first];
        const FusedLayout layout(n, size);
        const Divided d = divide(args, layout, first, n);
        (args.bf16_products ? run_bf16_level : run_level)(
            FusedChunk{args, layout, n, size.threads, first > 0, args.tokens.order + first, args.tokens.scale + first,
                       d.limit.data(), d.active.data(), d.kept.data(), d.part_begin.data(), d.block_begin.data(),
                       d.target_rows.data(), d.first.get()});
    }
    if (args.dweight == nullptr) return;
    const int64_t written = args.count > 0 ? args.tokens.limit[0] : 0;
    std::fill(args.dweight + written * args.dim, args.dweight + args.classes * args.dim, 0.0f);
}

}  // namespace m4k
