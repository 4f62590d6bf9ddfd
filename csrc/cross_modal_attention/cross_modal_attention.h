// Cross-modal attention over packed samples on the CPU: what crosses from Python, and the plan that every SIMD level
// works from. The specification is m4kernels/ops/cross_modal_attention/reference.py.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace m4k {

// A (tokens, heads, head_dim) tensor whose last dimension is contiguous; steps in elements.
template <typename T>
struct Heads {
    T* data;
    int64_t token;
    int64_t head;
};

struct AttentionShape {
    int64_t q_tokens, k_tokens;
    int q_heads, kv_heads, head_dim;
    float scale;
    int threads;
};

// T is float, or uint16_t for the bits of bfloat16. Outputs and gradients may be views into larger tensors too.
template <typename T>
struct ForwardArgs {
    AttentionShape shape;
    Heads<const T> q, k, v;
    Heads<T> out;
    float* lse;  // (q_heads, q_tokens)
    float* workspace;
    int64_t workspace_step;  // floats of each thread
};

template <typename T>
struct BackwardArgs {
    AttentionShape shape;
    Heads<const T> grad_out, q, k, v;
    const float* lse;  // (q_heads, q_tokens)
    Heads<T> grad_q, grad_k, grad_v;
    float* workspace;
    int64_t workspace_step;
};

// Where the samples and groups lie. Modalities side by side that attend alike, or are attended to alike, are one group:
// with every pair allowed there is a single group, and nothing is padded but its end.
struct AttentionPlan {
    int64_t batch;
    int q_groups, k_groups;
    const int32_t* q_bounds;  // (batch, q_groups + 1): the token where each group begins, and where the last ends
    const int32_t* k_bounds;  // (batch, k_groups + 1)
    const uint8_t* allowed;   // (q_groups, k_groups)
    const int32_t* order;     // (batch): samples, the most work first
    int32_t longest_k;        // keys of the largest sample
    int64_t q_end, k_end;     // tokens that belong to samples
    int64_t pairs;            // (query, key) pairs within samples, before any is left out
};

// Query rows that the backward pass works on at a time, a whole number of register blocks at every level. Their scores
// and the packed keys stay in an L2 cache of 512 KB for samples of 256 tokens.
inline constexpr int kBackwardRows = 84;
// The widest register, and the most rows of a register block, of any level: what workspaces are sized for.
inline constexpr int kMaxLanes = 16;
inline constexpr int kMaxRows = 14;

// Floats that one thread takes from its workspace, at most.
struct AttentionWorkspace {
    int64_t columns;  // of a row of scores, each group padded to whole registers
    int64_t dim;      // head_dim, padded likewise
    int64_t forward;
    int64_t backward;
    AttentionWorkspace(int64_t longest_k, int k_groups, int head_dim);
};

M4K_DECLARE_LEVELS(void, attention_forward, (const AttentionPlan& plan, const ForwardArgs<float>& args))
M4K_DECLARE_LEVELS(void, attention_forward, (const AttentionPlan& plan, const ForwardArgs<uint16_t>& args))
M4K_DECLARE_LEVELS(void, attention_backward, (const AttentionPlan& plan, const BackwardArgs<float>& args))
M4K_DECLARE_LEVELS(void, attention_backward, (const AttentionPlan& plan, const BackwardArgs<uint16_t>& args))

// The entry points: run the level in use, then clear the tokens that belong to no sample.
template <typename T>
void cross_modal_attention(const AttentionPlan& plan, const ForwardArgs<T>& args);
template <typename T>
void cross_modal_attention_backward(const AttentionPlan& plan, const BackwardArgs<T>& args);

}  // namespace m4k
