// Builds the plan of a call from its segments.
#pragma once

#include <vector>

#include "common/segments.h"
#include "cross_modal_attention/cross_modal_attention.h"

namespace m4k {

class PlanBuilder {
  public:
    // allow (modalities, modalities), or null for all pairs.
    PlanBuilder(const SegmentsView& q, const SegmentsView& k, const bool* allow, int64_t batch, int modalities);
    AttentionPlan plan() const;

  private:
    int64_t batch_;
    int q_groups_, k_groups_;
    int32_t longest_k_ = 0;
    int64_t q_end_, k_end_, pairs_ = 0;
    std::vector<int32_t> q_bounds_, k_bounds_, order_;
    std::vector<uint8_t> allowed_;
};

}  // namespace m4k
