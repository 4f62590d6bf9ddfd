#include "cross_modal_attention/plan.h"

#include <algorithm>
#include <numeric>

namespace m4k {
namespace {

// The first modality of every group, and the number of modalities: a modality joins the group before it where `alike`.
template <typename Alike>
std::vector<int> group_modalities(int modalities, const Alike& alike) {
    std::vector<int> first;
    for (int m = 0; m < modalities; ++m) {
        if (m == 0 || !alike(m - 1, m)) first.push_back(m);
    }
    first.push_back(modalities);
    return first;
}

std::vector<int32_t> group_bounds(const SegmentsView& segments, int64_t batch, int modalities,
                                  const std::vector<int>& first) {
    std::vector<int32_t> bounds;
    bounds.reserve(batch * first.size());
    for (int64_t b = 0; b < batch; ++b) {
        int32_t token = segments.cu_seqlens[b];
        for (size_t g = 0; g < first.size(); ++g) {
            bounds.push_back(token);
            if (g + 1 == first.size()) break;
            for (int m = first[g]; m < first[g + 1]; ++m) token += segments.counts[b * modalities + m];
        }
    }
    return bounds;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

PlanBuilder::PlanBuilder(const SegmentsView& q, const SegmentsView& k, const bool* allow, int64_t batch, int modalities)
    : batch_(batch), q_end_(q.cu_seqlens[batch]), k_end_(k.cu_seqlens[batch]), order_(batch) {
    const auto pair = [&](int i, int j) { return allow == nullptr || allow[i * modalities + j]; };
    const auto rows_alike = [&](int i, int j) {
        for (int m = 0; m < modalities; ++m) {
            if (pair(i, m) != pair(j, m)) return false;
        }
        return true;
    };
    const auto columns_alike = [&](int i, int j) {
        for (int m = 0; m < modalities; ++m) {
            if (pair(m, i) != pair(m, j)) return false;
        }
        return true;
    };
    const std::vector<int> q_first = group_modalities(modalities, rows_alike);
    const std::vector<int> k_first = group_modalities(modalities, columns_alike);
    q_groups_ = static_cast<int>(q_first.size()) - 1;
    k_groups_ = static_cast<int>(k_first.size()) - 1;
    for (int i = 0; i < q_groups_; ++i) {
        for (int j = 0; j < k_groups_; ++j) allowed_.push_back(pair(q_first[i], k_first[j]));
    }
    q_bounds_ = group_bounds(q, batch, modalities, q_first);
    k_bounds_ = group_bounds(k, batch, modalities, k_first);

    std::vector<int64_t> work(batch);
    for (int64_t b = 0; b < batch; ++b) {
        const int32_t keys = k.cu_seqlens[b + 1] - k.cu_seqlens[b];
        work[b] = int64_t{q.cu_seqlens[b + 1] - q.cu_seqlens[b]} * keys;
        pairs_ += work[b];
        longest_k_ = std::max(longest_k_, keys);
    }
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int32_t i, int32_t j) { return work[i] > work[j]; });
}

AttentionPlan PlanBuilder::plan() const {
    return {batch_,           q_groups_,       k_groups_,     q_bounds_.data(),
            k_bounds_.data(), allowed_.data(), order_.data(), longest_k_,
            q_end_,           k_end_,          pairs_};
}

AttentionWorkspace::AttentionWorkspace(int64_t longest_k, int k_groups, int head_dim) {
    // An odd number of cache lines between the rows of scores: walking down a column then uses every set of the cache.
    columns = round_up(longest_k + int64_t{k_groups} * (kMaxLanes - 1), kMaxLanes) | kMaxLanes;
    dim = round_up(head_dim, kMaxLanes);
    const int64_t panels = columns * dim, keys = longest_k * dim, spans = round_up(int64_t{k_groups} * 4, kMaxLanes);
    const int64_t block = kMaxRows * dim, slab = kMaxLanes * dim;
    forward = panels + keys + slab + 2 * block + kMaxRows * columns + spans;
    backward = 2 * panels + 3 * keys + slab + 2 * kBackwardRows * (dim + columns) + block + 2 * spans;
}

}  // namespace m4k
