// What adamw_step does once for every tensor, and how its elements are divided among threads.
#include "adamw_step/adamw_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace m4k {
namespace {

// Elements of a part: 128 KiB of each of four arrays, 40 us of work. Threads share the parts of all tensors alike.
constexpr int64_t kPart = 1 << 15;

struct Part {
    int64_t tensor, start, elements;
};

void run_part(const AdamWTensor& tensor, const AdamWFactors& factors, const Part& part) {
    M4K_CALL_LEVEL(adamw_part, (tensor, factors, part.start, part.elements));
}

AdamWFactors factors_of(const AdamWArgs& a, double step) {
    return {a.grad_factor == nullptr ? 1.0f : *a.grad_factor,
            static_cast<float>(1.0 - a.lr * a.weight_decay),
            static_cast<float>(1.0 - a.beta1),
            static_cast<float>(a.beta2),
            static_cast<float>(1.0 - a.beta2),
            static_cast<float>(std::sqrt(1.0 - std::pow(a.beta2, step))),
            static_cast<float>(a.eps),
            static_cast<float>(a.lr / (1.0 - std::pow(a.beta1, step)))};
}

}  // namespace

void adamw_step(const AdamWArgs& a) {
    if (a.found_inf != nullptr && *a.found_inf != 0.0f) return;
    static_assert(sizeof(AdamWTensor) == 6 * sizeof(int64_t));
    std::vector<AdamWTensor> tensors(a.tensors);
    std::memcpy(tensors.data(), a.table, a.tensors * sizeof(AdamWTensor));
    std::vector<AdamWFactors> factors;
    std::vector<Part> parts;
    for (int64_t t = 0; t < a.tensors; ++t) {
        *tensors[t].step += 1.0f;
        factors.push_back(factors_of(a, *tensors[t].step));
        for (int64_t start = 0; start < tensors[t].elements; start += kPart) {
            parts.push_back({t, start, std::min(kPart, tensors[t].elements - start)});
        }
    }
    const int64_t count = static_cast<int64_t>(parts.size());
    const int threads = static_cast<int>(std::min<int64_t>(a.threads, count));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) run_part(tensors[parts[i].tensor], factors[parts[i].tensor], parts[i]);
}

}  // namespace m4k
