#include "linear_cross_entropy/whole.h"

#include <algorithm>
#include <cmath>

namespace m4k {
namespace {

template <typename T>
void run(const WholeLogits<T>& a) {
    for (int64_t t = 0; t < a.tokens; ++t) {
        const T* row = a.logits + t * a.classes;
        const int64_t target = a.targets[t];
        const T at_target = row[target];
        // Classes that go before the target; the sums are written so that the compiler vectorises them.
        int32_t above = 0;
        for (int64_t v = 0; v < target; ++v) above += row[v] >= at_target;
        for (int64_t v = target; v < a.classes; ++v) above += row[v] > at_target;
        a.nll[t] = -a.log_softmax[t * a.classes + target];
        a.correct[t] = above == 0 && !std::isnan(a.nll[t]);
    }
}

}  // namespace

void whole_logits(const WholeLogits<float>& args) { run(args); }
void whole_logits(const WholeLogits<double>& args) { run(args); }

bool are_classes(const int64_t* targets, int64_t tokens, int64_t classes) {
    return std::all_of(targets, targets + tokens, [=](int64_t target) { return target >= 0 && target < classes; });
}

}  // namespace m4k
