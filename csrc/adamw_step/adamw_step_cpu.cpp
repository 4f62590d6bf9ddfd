// CPU kernel of adamw_step, compiled once per SIMD level. Every number is read once and written once, so memory bounds
// it: 7 of them an element.
#include <cstring>

#include "adamw_step/adamw_step.h"
#include "common/vec.h"

namespace m4k::M4K_SIMD_NS {
namespace {

// One register of each; in the order of roundings that torch's fused kernel has.
M4K_INLINE void update(const AdamWFactors& f, float* param, const float* grad, float* exp_avg, float* exp_avg_sq) {
    const vfloat g = load(grad) * splat(f.grad);
    const vfloat m = load(exp_avg);
    const vfloat first = fma(splat(f.first), g - m, m);
    const vfloat second = fma(splat(f.second) * g, g, load(exp_avg_sq) * splat(f.old_second));
    store(exp_avg, first);
    store(exp_avg_sq, second);
    const vfloat denominator = vsqrt(second) / splat(f.root) + splat(f.eps);
    store(param, load(param) * splat(f.keep) - splat(f.size) * first / denominator);
}

}  // namespace

void adamw_part(const AdamWTensor& tensor, const AdamWFactors& factors, int64_t start, int64_t elements) {
    const AdamWFactors f = factors;  // no store can change it
    float* const param = tensor.param + start;
    const float* const grad = tensor.grad + start;
    float* const exp_avg = tensor.exp_avg + start;
    float* const exp_avg_sq = tensor.exp_avg_sq + start;
    int64_t i = 0;
    for (; i + kLanes <= elements; i += kLanes) update(f, param + i, grad + i, exp_avg + i, exp_avg_sq + i);
    if (i == elements) return;
    // The rest in a whole register too, so that the bits of an element do not depend on where a part ends.
    const size_t bytes = static_cast<size_t>(elements - i) * sizeof(float);
    float rest[4][kLanes] = {};
    std::memcpy(rest[0], param + i, bytes);
    std::memcpy(rest[1], grad + i, bytes);
    std::memcpy(rest[2], exp_avg + i, bytes);
    std::memcpy(rest[3], exp_avg_sq + i, bytes);
    update(f, rest[0], rest[1], rest[2], rest[3]);
    std::memcpy(param + i, rest[0], bytes);
    std::memcpy(exp_avg + i, rest[2], bytes);
    std::memcpy(exp_avg_sq + i, rest[3], bytes);
}

}  // namespace m4k::M4K_SIMD_NS
