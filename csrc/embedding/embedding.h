// Gradient of an embedding's rows. The specification is m4kernels/ops/embedding/reference.py.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace m4k {

template <typename T>
struct EmbeddingArgs {
    const T* grad;       // (tokens, dim) contiguous: of what the tokens got
    const int64_t* ids;  // (tokens) in [0, rows)
    T* out;              // (rows, dim): of the rows
    int64_t tokens;
    int64_t dim;
    int64_t rows;
    int threads;
};

M4K_DECLARE_LEVELS(void, embedding_backward_f32, (const EmbeddingArgs<float>& args))
M4K_DECLARE_LEVELS(void, embedding_backward_f64, (const EmbeddingArgs<double>& args))

// False, with nothing written, where an id is not in [0, rows).
bool embedding_backward(const EmbeddingArgs<float>& args);
bool embedding_backward(const EmbeddingArgs<double>& args);

}  // namespace m4k
