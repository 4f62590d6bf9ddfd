// The weight's blocks in the words that the products read. Only for *_cpu.cpp files.
#pragma once

#include "common/words.h"
#include "linear_cross_entropy/fused.h"

namespace m4k::M4K_SIMD_NS {

// A block of the weight as the products read it: words along its rows for z = W x, and words down its columns for
// d x = W^T P. Of floats both are the rows.
struct WeightBlock {
    const float* along;
    int64_t along_step;
    const float* down;
    int64_t down_step;
    int64_t first;    // class
    int64_t classes;  // of them
};

// Fills the copies whose addresses are not null; steps in words.
template <typename Kind>
static void copy_weight(const FusedSource& weight, int64_t first, int64_t classes, int64_t dim, float* along,
                        int64_t along_step, float* down, int64_t down_step) {
    alignas(64) float numbers[2 * kPiece];
    for (int64_t v = 0; v < classes; v += Kind::kNumbers) {
        for (int64_t d = 0; d < dim; d += kPiece) {
            const int64_t count = dim - d < kPiece ? dim - d : kPiece, padded = round_up(count, kLanes);
            const int64_t some = classes - v < Kind::kNumbers ? classes - v : Kind::kNumbers;
            for (int64_t i = 0; i < some; ++i) {
                load_numbers(weight, first + v + i, d, count, padded, numbers + i * kPiece);
                if (!along) continue;
                pack_along<Kind>(numbers + i * kPiece, padded, along + (v + i) * along_step + d / Kind::kNumbers);
            }
            if (!down) continue;
            pack_down<Kind>(numbers, kPiece, some, static_cast<int>(padded / kLanes),
                            down + v / Kind::kNumbers * down_step + d, down_step);
        }
    }
}

}  // namespace m4k::M4K_SIMD_NS
