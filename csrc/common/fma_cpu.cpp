// The loop of fma.h.
#include "common/fma.h"
#include "common/vec.h"

namespace m4k::M4K_SIMD_NS {

int64_t fma_loop(int64_t steps) {
    constexpr int kSums = 12;  // two units of four cycles' latency need eight; the registers of AVX2 hold no more
    vfloat sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = splat(static_cast<float>(i));
    volatile float half = 0.5f, one = 1.0f;  // the compiler must not know where this leads
    const vfloat factor = splat(half), term = splat(one);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = fma(sums[i], factor, term);
    }
    vfloat sum = sums[0];
#pragma GCC unroll 12
    for (int i = 1; i < kSums; ++i) sum = sum + sums[i];
    float lanes[kLanes];
    store(lanes, sum);
    volatile float sink = lanes[0];
    (void)sink;
    return steps * kSums * kLanes * 2;
}

}  // namespace m4k::M4K_SIMD_NS
