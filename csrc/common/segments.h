// Where samples and modalities lie in packed tokens: the C++ side of m4kernels.Segments.
#pragma once

#include <cstdint>

namespace m4k {

struct SegmentsView {
    const int32_t* cu_seqlens;  // (batch + 1)
    const int32_t* counts;      // (batch, modalities)
};

// Whether cu_seqlens starts at 0, never decreases and ends within `total` tokens, counts are not negative and add up to
// each sample's length, and no sample is longer than max_seqlen. Segments.check_values says what is wrong.
bool segments_consistent(const SegmentsView& segments, int64_t batch, int64_t modalities, int64_t total,
                         int64_t max_seqlen);

}  // namespace m4k
