// The most multiplications and additions that a core can do, for whoever says how far a kernel is from it.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace m4k {

M4K_DECLARE_LEVELS(int64_t, fma_loop, (int64_t steps))

// Independent products added up in registers, `steps` of each; returns their floating-point operations, two each.
int64_t fma_loop(int64_t steps);

}  // namespace m4k
