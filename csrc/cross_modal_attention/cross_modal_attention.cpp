#include "cross_modal_attention/cross_modal_attention.h"

#include <algorithm>
#include <limits>

namespace m4k {
namespace {

void run_level(const AttentionPlan& plan, const ForwardArgs<float>& args) {
    M4K_CALL_LEVEL(attention_forward, (plan, args));
}
void run_level(const AttentionPlan& plan, const ForwardArgs<uint16_t>& args) {
    M4K_CALL_LEVEL(attention_forward, (plan, args));
}
void run_level(const AttentionPlan& plan, const BackwardArgs<float>& args) {
    M4K_CALL_LEVEL(attention_backward, (plan, args));
}
void run_level(const AttentionPlan& plan, const BackwardArgs<uint16_t>& args) {
    M4K_CALL_LEVEL(attention_backward, (plan, args));
}

// Zeros in the tokens that belong to no sample. Head by head: what lies between may be another tensor's.
template <typename T>
void clear_tail(const Heads<T>& x, int heads, int head_dim, int64_t end, int64_t tokens) {
    for (int64_t token = end; token < tokens; ++token) {
        for (int head = 0; head < heads; ++head) {
            std::fill_n(x.data + token * x.token + head * x.head, head_dim, T{0});
        }
    }
}

// Below this many multiplications a second thread costs more than it saves (about 5 us to wake it).
constexpr int64_t kMinWorkPerThread = 200000;

template <typename Args>
Args with_useful_threads(const AttentionPlan& plan, Args args) {
    const int64_t useful = plan.pairs * args.shape.q_heads * args.shape.head_dim / kMinWorkPerThread;
    const int64_t tasks = plan.batch * args.shape.kv_heads;
    const int64_t most = std::min<int64_t>({args.shape.threads, useful, tasks});
    args.shape.threads = static_cast<int>(std::max<int64_t>(1, most));
    return args;
}

}  // namespace

template <typename T>
void cross_modal_attention(const AttentionPlan& plan, const ForwardArgs<T>& args) {
    run_level(plan, with_useful_threads(plan, args));
    const AttentionShape& shape = args.shape;
    clear_tail(args.out, shape.q_heads, shape.head_dim, plan.q_end, shape.q_tokens);
    for (int h = 0; h < shape.q_heads; ++h) {
        float* row = args.lse + h * shape.q_tokens;
        std::fill(row + plan.q_end, row + shape.q_tokens, -std::numeric_limits<float>::infinity());
    }
}

template <typename T>
void cross_modal_attention_backward(const AttentionPlan& plan, const BackwardArgs<T>& args) {
    run_level(plan, with_useful_threads(plan, args));
    const AttentionShape& shape = args.shape;
    clear_tail(args.grad_q, shape.q_heads, shape.head_dim, plan.q_end, shape.q_tokens);
    clear_tail(args.grad_k, shape.kv_heads, shape.head_dim, plan.k_end, shape.k_tokens);
    clear_tail(args.grad_v, shape.kv_heads, shape.head_dim, plan.k_end, shape.k_tokens);
}

template void cross_modal_attention(const AttentionPlan&, const ForwardArgs<float>&);
template void cross_modal_attention(const AttentionPlan&, const ForwardArgs<uint16_t>&);
template void cross_modal_attention_backward(const AttentionPlan&, const BackwardArgs<float>&);
template void cross_modal_attention_backward(const AttentionPlan&, const BackwardArgs<uint16_t>&);

}  // namespace m4k
