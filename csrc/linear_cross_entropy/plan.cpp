// Which tokens count, in which order, and how they are cut into chunks.
#include <algorithm>

#include "linear_cross_entropy/linear_cross_entropy.h"

namespace m4k {
namespace {

// A product with few rows takes as long as one with about this many: the weight has to be read and packed either way.
constexpr int64_t kRowsOfFixedCost = 48;

template <typename T>
int64_t order_all(const TokenArgs<T>& a, const OrderedTokens<T>& out) {
    int64_t count = 0;
    bool sorted = true;
    for (int64_t t = 0; t < a.tokens; ++t) {
        const int64_t target = a.targets[t];
        if (target == a.ignore_index) continue;
        int64_t limit = a.classes;
        if (a.vocab_limit != nullptr) {
            limit = a.limit_bytes == 4 ? static_cast<const int32_t*>(a.vocab_limit)[t]
                                       : static_cast<const int64_t*>(a.vocab_limit)[t];
        }
        if (target < 0 || target >= limit || limit > a.classes) return -1 - t;
        sorted &= count == 0 || out.limit[count - 1] >= limit;
        out.order[count] = t;
        out.limit[count] = limit;
        ++count;
    }
    if (!sorted) {
        // limit holds the limits by rank; sort the ranks, then carry both arrays along.
        std::vector<std::pair<int64_t, int64_t>> tokens(count);
        for (int64_t i = 0; i < count; ++i) tokens[i] = {-out.limit[i], out.order[i]};
        std::sort(tokens.begin(), tokens.end());
        for (int64_t i = 0; i < count; ++i) {
            out.limit[i] = -tokens[i].first;
            out.order[i] = tokens[i].second;
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        out.scale[i] = a.token_weight != nullptr ? a.token_weight[out.order[i]] : T(1) / static_cast<T>(count);
    }
    return count;
}

}  // namespace

int64_t order_tokens(const TokenArgs<float>& args, const OrderedTokens<float>& out) { return order_all(args, out); }
int64_t order_tokens(const TokenArgs<double>& args, const OrderedTokens<double>& out) { return order_all(args, out); }

std::vector<Chunk> plan_chunks(const int64_t* limit, int64_t count, const ChunkBudget& budget) {
    std::vector<Chunk> chunks;
    for (int64_t first = 0; first < count;) {
        const int64_t width = limit[first];
        const int64_t fits = budget.bytes / (width * budget.per_logit + budget.per_row);
        const int64_t most = std::clamp<int64_t>(fits, 1, budget.max_rows);
        // The end of the tokens that this width serves: where the classes saved by a narrower product for the rest of
        // the chunk outweigh the fixed cost of one more product.
        int64_t end = first + 1;
        while (end < count) {
            const int64_t rest = std::min(count - end, most);
            if ((width - limit[end]) * rest > kRowsOfFixedCost * limit[end]) break;
            ++end;
        }
        const int64_t parts = (end - first + most - 1) / most;  // of equal size, rather than a small one at the end
        const int64_t rows = (end - first + parts - 1) / parts;
        chunks.push_back({first, rows, width});
        first += rows;
    }
    return chunks;
}

}  // namespace m4k
