// Matrix products of a linear layer with what surrounds them in a transformer: bias, residual, GELU before the product
// and its derivative after it. Forward pass and both gradients are the same product C = A B with other strides.
// The specification is m4kernels/ops/linear/reference.py.
//
// A block of the columns of B is packed once, for its whole depth, into panels of whole registers; then each task takes
// some rows: it packs them a slab of the depth at a time, multiplies them with every panel of the slab, and adds up in
// a buffer of its own, which stays in L2. What follows the product happens when the buffer is written out. An element
// is always summed in the same order, whatever the number of threads.
#pragma once

#include <cstdint>

#include "common/matrix.h"
#include "common/simd.h"

namespace m4k {

// out = (A B + bias + residual) * gelu'(slope_at)
struct LinearArgs {
    MatrixSource a;         // (rows, depth)
    MatrixSource b;         // (depth, columns)
    bool bf16_products;     // of numbers that are bfloat16, or rounded to it; sums are of floats in any case
    const float* bias;      // (columns,) or null
    MatrixSource residual;  // (rows, columns), data null: none
    MatrixSource slope_at;  // (rows, columns), data null: none
    void* out;              // (rows, columns) contiguous, float or bfloat16
    bool out_is_bf16;
    int64_t rows, columns, depth;
    float* workspace;  // linear_workspace floats, aligned to 64 bytes
    int threads;
};

// How a product is divided; the same for every SIMD level, so that one workspace serves all.
struct LinearLayout {
    static constexpr int64_t kTaskRows = 112;    // a multiple of AVX-512's 14 rows of a register block
    static constexpr int64_t kTileFloats = 160;  // of a word of the depth: kTaskRows, each tile of them padded

    int64_t words;         // of the depth
    int64_t slab;          // words of the depth that a task packs at a time
    int64_t block;         // columns that are packed at once, whole panels
    int64_t row_tasks;     // parts of the rows
    int64_t column_tasks;  // parts of a block's columns
    int threads;
    int64_t thread, per_thread;  // where the threads' buffers begin, floats of each
    int64_t floats;              // of workspace

    explicit LinearLayout(const LinearArgs& args);
};

M4K_DECLARE_LEVELS(void, linear_product, (const LinearArgs& args, const LinearLayout& layout))
M4K_DECLARE_BF16_LEVELS(void, linear_product_bf16, (const LinearArgs& args, const LinearLayout& layout))

// Runs the level in use.
void linear(const LinearArgs& args);

}  // namespace m4k
