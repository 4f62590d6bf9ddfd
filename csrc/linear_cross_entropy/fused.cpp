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
// Tokens of a chunk: a block of gradients stays in L2.
constexpr int64_t kMaxRows = 768;
// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 200000;

int64_t units(int64_t n) { return (n + kUnit - 1) / kUnit; }
int64_t padded(int64_t n) { return units(n) * kUnit; }
int64_t odd_lines(int64_t n) { return (units(n) | 1) * kUnit; }

// Rows of the weight whose distance is a large power of two share one set of the L1 cache: such a block is copied.
bool needs_copy(int64_t weight_row) { return weight_row * 4 % 2048 == 0; }

int useful_threads(int64_t work, int threads) {
    return static_cast<int>(std::clamp<int64_t>(work / kMinWorkPerThread, 1, threads));
}

}  // namespace

FusedLayout::FusedLayout(int64_t rows, int64_t dim, int64_t classes, int64_t weight_row, bool dx, bool dweight,
                         int threads)
    : step(odd_lines(rows)), block(dim > kWideDim ? kNarrowBlock : kBlock), blocks((classes + block - 1) / block) {
    parts = std::min<int64_t>(blocks, std::max(kParts, threads));
    copy_step = needs_copy(weight_row) ? odd_lines(dim) : 0;
    int64_t next = 0;
    const auto take = [&next](int64_t floats) {
        const int64_t at = next;
        next += padded(floats);
        return at;
    };
    x_panels = take(padded(rows) * dim);
    x_columns = take(dweight ? padded(dim) * rows : 0);
    part_state = take(3 * parts * step);
    row_state = take(4 * step);
    dx_parts = take(dx ? parts * dim * step : 0);
    thread = next;
    take(block * kPanel);
    thread_weight = take(block * copy_step) - thread;
    thread_gradient = take(dx || dweight ? block * step : 0) - thread;
    thread_tail = take(dweight ? kUnit * kPanel : 0) - thread;
    per_thread = next - thread;
    logits = thread + threads * per_thread;
}

FusedPlan plan_fused(int64_t count, int64_t dim, int64_t classes, int64_t weight_row, bool dx, bool dweight,
                     int64_t floats, int threads) {
    if (count == 0) return {1, 0, 0};
    threads = useful_threads(count * classes * dim, threads);
    for (int64_t most = kMaxRows; most >= kUnit; most = padded(most / 2)) {
        const int64_t chunks = (count + most - 1) / most;
        const int64_t rows = chunks == 1 ? count : padded((count + chunks - 1) / chunks);
        const FusedLayout layout(rows, dim, classes, weight_row, dx, dweight, threads);
        if (layout.logits <= floats) {
            const int64_t all = dx || dweight ? padded(rows) * classes + layout.blocks * kUnit : 0;
            const int64_t kept = std::min(floats - layout.logits, all);
            return {rows, layout.logits + kept, kept};
        }
        if (most == kUnit) break;
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

}  // namespace

void fused_cross_entropy(const FusedArgs& args, int64_t rows) {
    const int threads = useful_threads(args.count * args.classes * args.dim, args.threads);
    for (int64_t first = 0; first < args.count; first += rows) {
        const int64_t n = std::min(rows, args.count - first);
        const int64_t width = args.tokens.limit[first];
        const FusedLayout layout(n, args.dim, width, args.weight_row, args.dx != nullptr, args.dweight != nullptr,
                                 threads);
        const Divided d = divide(args, layout, first, n);
        run_level(FusedChunk{args, layout, n, threads, first > 0, args.tokens.order + first, args.tokens.scale + first,
                             d.limit.data(), d.active.data(), d.kept.data(), d.part_begin.data(), d.block_begin.data(),
                             d.target_rows.data(), d.first.get()});
    }
    if (args.dweight == nullptr) return;
    const int64_t written = args.count > 0 ? args.tokens.limit[0] : 0;
    std::fill(args.dweight + written * args.dim, args.dweight + args.classes * args.dim, 0.0f);
}

}  // namespace m4k
