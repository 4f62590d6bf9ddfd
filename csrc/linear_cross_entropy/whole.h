// What small losses need of whole logits besides the loss, which is PyTorch's
// (m4kernels/ops/linear_cross_entropy/small.py).
#pragma once

#include <cstdint>

namespace m4k {

template <typename T>
struct WholeLogits {
    const T* logits;         // (tokens, classes) contiguous
    const T* log_softmax;    // (tokens, classes) contiguous
    const int64_t* targets;  // (tokens) in [0, classes)
    T* nll;                  // (tokens), written
    bool* correct;           // (tokens), written: the target is the first of the largest logits, and nll is no NaN
    int64_t tokens;
    int64_t classes;
};

void whole_logits(const WholeLogits<float>& args);
void whole_logits(const WholeLogits<double>& args);

// Whether all (tokens) are in [0, classes).
bool are_classes(const int64_t* targets, int64_t tokens, int64_t classes);

}  // namespace m4k
