// Loss and gradients in two sweeps over the classes, with products of our own (common/microkernel.h): the softmax pass
// works on a block of logits while it lies in a core's cache.
//
// A chunk of tokens is multiplied with a block of classes at a time, transposed: a register holds one class of kLanes
// tokens. So the maximum and the sum of exponentials of a token are sums down its lane, a row of the weight is read as
// it lies, one number at a time, and nothing of the weight has to be packed. The first sweep leaves each token's
// log-sum-exp and stores as many blocks of logits as the workspace holds; the second reads them back, or multiplies
// once more, turns them into gradients P and adds P X to d weight and the block's share of P^T W to d x.
//
// Tokens come with the widest vocabulary first, so those that a block of classes concerns are the first of the chunk.
// The classes are divided into parts whose number does not depend on the threads, each with its own sum of d x, so the
// results do not depend on the threads either (up to kParts of them).
#pragma once

#include <cstdint>
#include <vector>

#include "common/matrix.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace m4k {

using FusedSource = MatrixSource;

// Whether a block of the weight is copied, since no product reads it as it lies.
bool copies_weight(const FusedSource& weight, bool bf16_products);

struct FusedArgs {
    FusedSource x;           // (tokens, dim)
    FusedSource weight;      // (classes, dim)
    bool bf16_products;      // products of bfloat16 numbers, the gradients of the logits rounded too; else of floats
    const int64_t* targets;  // (tokens,)
    OrderedTokens<float> tokens;
    int64_t count;  // valid tokens
    int64_t dim, classes;
    float* nll;        // (tokens,)
    bool* correct;     // (tokens,)
    float* dx;         // (tokens, dim) contiguous, or null: not wanted
    float* dweight;    // (classes, dim) contiguous, or null
    float* workspace;  // aligned to 64 bytes
    int64_t floats;    // of the workspace
    int threads;
};

// What a plan depends on.
struct FusedSize {
    int64_t dim, classes;
    bool dx, dweight;  // wanted
    bool copies_weight;
    bool bf16_products;
    int threads;
};

// What a call is divided into.
struct FusedPlan {
    int64_t rows;    // tokens of a chunk; 0: the workspace does not hold the smallest
    int64_t floats;  // of workspace that are of use
    int64_t logits;  // of these, for logits that would be computed twice otherwise
};
FusedPlan plan_fused(int64_t count, FusedSize size, int64_t floats);

// Fills nll, correct, dx and dweight, d weight rows beyond the widest vocabulary with 0; chunks of plan.rows tokens.
void fused_cross_entropy(const FusedArgs& args, int64_t rows);

// Where the pieces of a chunk's workspace lie, in floats.
struct FusedLayout {
    static constexpr int64_t kUnit = 16;  // floats of the widest register
    static constexpr int64_t kPanel = 2 * kUnit;

    int64_t step;    // of arrays with a number a token: an odd number of cache lines, so that columns use every set
    int64_t block;   // classes of a block
    int64_t blocks;  // of them
    int64_t parts;   // of the blocks
    int64_t along_step, down_step;  // of the weight's copies (see WeightBlock); 0: read as it lies
    int64_t x_panels;               // X transposed, panels of tokens
    int64_t x_columns;              // X, panels of columns
    int64_t part_state, row_state, dx_parts, thread, logits;
    // Within a thread's piece, which begins with a panel of a block's logits.
    int64_t thread_along, thread_down, thread_gradient, thread_gradient_down, thread_tail, per_thread;

    FusedLayout(int64_t rows, const FusedSize& size);
};

// Numbers of each token of a chunk, (step,) each.
struct FusedRows {
    float *top, *factor, *target_gradient, *target_logit;
};

// One chunk: what a call of a level's kernel gets.
struct FusedChunk {
    const FusedArgs& args;
    const FusedLayout& layout;
    int64_t rows;
    int threads;
    bool add;                    // d weight holds the chunks before
    const int64_t* order;        // (rows,)
    const float* scale;          // (rows,)
    const int64_t* limit;        // (step,), 0 beyond rows
    const int64_t* active;       // (blocks,) tokens that the block concerns
    const int64_t* kept;         // (blocks,) where its logits are stored in the workspace; -1: nowhere
    const int64_t* part_begin;   // (parts + 1,) its first block
    const int64_t* block_begin;  // (blocks + 1,) first of the targets that lie in the block
    const int64_t* target_rows;  // (rows,) tokens by the block of their target, then ascending
    bool* first;                 // (step,) no class before the target in its block has the target's logit
};

M4K_DECLARE_LEVELS(void, fused_chunk, (const FusedChunk& chunk))
M4K_DECLARE_BF16_LEVELS(void, fused_chunk_bf16, (const FusedChunk& chunk))

}  // namespace m4k
