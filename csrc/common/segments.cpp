#include "common/segments.h"

namespace m4k {

bool segments_consistent(const SegmentsView& segments, int64_t batch, int64_t modalities, int64_t total,
                         int64_t max_seqlen) {
    if (segments.cu_seqlens[0] != 0) return false;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = int64_t{segments.cu_seqlens[b + 1]} - segments.cu_seqlens[b];
        int64_t sum = 0;
        for (int64_t m = 0; m < modalities; ++m) {
            const int32_t count = segments.counts[b * modalities + m];
            if (count < 0) return false;
            sum += count;
        }
        if (length != sum || length > max_seqlen) return false;
    }
    return segments.cu_seqlens[batch] <= total;
}

}  // namespace m4k
