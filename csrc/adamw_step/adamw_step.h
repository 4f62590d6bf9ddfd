// One step of AdamW over many tensors. The specification is m4kernels/ops/adamw_step/reference.py.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace m4k {

struct AdamWTensor {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    float* step;  // one number, which the step increases by 1
    int64_t elements;
};

struct AdamWArgs {
    const int64_t* table;      // (tensors, 6): addresses and the number of elements, as in AdamWTensor
    const float* grad_factor;  // every gradient is multiplied by this; null for 1
    const float* found_inf;    // nothing changes where this is not 0; null for 0
    int64_t tensors;
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    int threads;
};

// The numbers that all elements of a tensor share, computed in double precision.
struct AdamWFactors {
    float grad;        // grad_factor
    float keep;        // 1 - lr * weight_decay
    float first;       // 1 - beta1
    float old_second;  // beta2
    float second;      // 1 - beta2
    float root;        // sqrt(1 - beta2^step)
    float eps;
    float size;  // lr / (1 - beta1^step)
};

// `elements` of the tensor from `start` on.
M4K_DECLARE_LEVELS(void, adamw_part,
                   (const AdamWTensor& tensor, const AdamWFactors& factors, int64_t start, int64_t elements))

void adamw_step(const AdamWArgs& args);

}  // namespace m4k
