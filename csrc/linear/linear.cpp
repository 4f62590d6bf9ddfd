// How a product of a linear layer is divided, and the choice of the SIMD level.
#include "linear/linear.h"

#include <algorithm>

namespace m4k {
namespace {

// Words of a slab of the depth: its rows of A, a panel of B and the sums stay in L2.
constexpr int64_t kSlab = 320;
constexpr int64_t kPanel = 32;  // columns of the widest register block
// Columns of a block: so many that packing A costs nothing beside them, so few that their sums stay in L2, and that the
// packed block stays in a cache of some MiB where the depth is short enough.
constexpr int64_t kMostColumns = 640, kFewestColumns = 256, kBlockFloats = 1 << 21;
// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 200000;

int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

LinearLayout::LinearLayout(const LinearArgs& a) {
    words = a.bf16_products ? parts_of(a.depth, 2) : a.depth;
    slab = words == 0 ? 1 : parts_of(words, parts_of(words, kSlab));
    const int64_t fitting = kBlockFloats / std::max<int64_t>(words, 1) / kPanel * kPanel;
    const int64_t most = std::clamp(fitting, kFewestColumns, kMostColumns);
    // Blocks of one size.
    const int64_t columns = parts_of(std::max<int64_t>(a.columns, 1), kPanel) * kPanel;
    block = parts_of(parts_of(columns, parts_of(columns, most)), kPanel) * kPanel;
    const int64_t work = a.rows * a.columns * std::max<int64_t>(a.depth, 1);
    threads = static_cast<int>(std::clamp<int64_t>(work / kMinWorkPerThread, 1, std::max(a.threads, 1)));
    row_tasks = parts_of(a.rows, kTaskRows);
    // Enough tasks to even out the threads' speeds, even where rows are few.
    column_tasks =
        threads == 1 || row_tasks == 0 ? 1 : std::clamp<int64_t>(parts_of(3 * threads, row_tasks), 1, block / kPanel);
    thread = block * words;
    per_thread = kTileFloats * slab + std::min(kTaskRows, a.rows) * block;
    floats = thread + threads * per_thread;
}

namespace {

void run_level(const LinearArgs& args, const LinearLayout& layout) { M4K_CALL_LEVEL(linear_product, (args, layout)); }
void run_bf16_level(const LinearArgs& args, const LinearLayout& layout) {
    M4K_CALL_BF16_LEVEL(linear_product_bf16, (args, layout));
}

}  // namespace

void linear(const LinearArgs& args) {
    const LinearLayout layout(args);
    (args.bf16_products ? run_bf16_level : run_level)(args, layout);
}

}  // namespace m4k
