// Python signatures of the attention kernels; Python has checked shapes, dtypes and segments.
#include "common/bind.h"

#include <tuple>

#include "common/pointer.h"
#include "cross_modal_attention/cross_modal_attention.h"
#include "cross_modal_attention/plan.h"

namespace m4k {
namespace {

using View = std::tuple<uintptr_t, int64_t, int64_t>;  // address; elements from token to token, from head to head

template <typename T>
Heads<T> heads(const View& view) {
    return {as_ptr<T>(std::get<0>(view)), std::get<1>(view), std::get<2>(view)};
}

PlanBuilder make_plan(uintptr_t q_cu_seqlens, uintptr_t q_counts, uintptr_t k_cu_seqlens, uintptr_t k_counts,
                      uintptr_t allow, int64_t batch, int modalities) {
    return PlanBuilder({as_ptr<const int32_t>(q_cu_seqlens), as_ptr<const int32_t>(q_counts)},
                       {as_ptr<const int32_t>(k_cu_seqlens), as_ptr<const int32_t>(k_counts)},
                       as_ptr<const bool>(allow), batch, modalities);
}

template <typename T>
void forward(const PlanBuilder& plan, int64_t q_tokens, int64_t k_tokens, int q_heads, int kv_heads, int head_dim,
             double scale, int threads, const View& q, const View& k, const View& v, const View& out, uintptr_t lse,
             uintptr_t workspace, int64_t workspace_step) {
    const AttentionShape shape{q_tokens, k_tokens, q_heads, kv_heads, head_dim, static_cast<float>(scale), threads};
    cross_modal_attention(plan.plan(),
                          ForwardArgs<T>{shape, heads<const T>(q), heads<const T>(k), heads<const T>(v), heads<T>(out),
                                         as_ptr<float>(lse), as_ptr<float>(workspace), workspace_step});
}

template <typename T>
void backward(const PlanBuilder& plan, int64_t q_tokens, int64_t k_tokens, int q_heads, int kv_heads, int head_dim,
              double scale, int threads, const View& grad_out, const View& q, const View& k, const View& v,
              uintptr_t lse, const View& grad_q, const View& grad_k, const View& grad_v, uintptr_t workspace,
              int64_t workspace_step) {
    const AttentionShape shape{q_tokens, k_tokens, q_heads, kv_heads, head_dim, static_cast<float>(scale), threads};
    cross_modal_attention_backward(
        plan.plan(), BackwardArgs<T>{shape, heads<const T>(grad_out), heads<const T>(q), heads<const T>(k),
                                     heads<const T>(v), as_ptr<const float>(lse), heads<T>(grad_q), heads<T>(grad_k),
                                     heads<T>(grad_v), as_ptr<float>(workspace), workspace_step});
}

template <typename T>
void define(py::module_& m, const char* forward_name, const char* backward_name) {
    def_by_name<&forward<T>, "plan", "q_tokens", "k_tokens", "q_heads", "kv_heads", "head_dim", "scale", "threads", "q",
                "k", "v", "out", "lse", "workspace", "workspace_step">(m, forward_name);
    def_by_name<&backward<T>, "plan", "q_tokens", "k_tokens", "q_heads", "kv_heads", "head_dim", "scale", "threads",
                "grad_out", "q", "k", "v", "lse", "grad_q", "grad_k", "grad_v", "workspace", "workspace_step">(
        m, backward_name);
}

}  // namespace

void bind_cross_modal_attention(py::module_& m) {
    py::class_<PlanBuilder>(m, "AttentionPlan")
        // (forward, backward): floats of workspace for each thread
        .def("workspace", [](const PlanBuilder& builder, int head_dim) {
            const AttentionPlan plan = builder.plan();
            const AttentionWorkspace size(plan.longest_k, plan.k_groups, head_dim);
            return std::tuple(size.forward, size.backward);
        });
    def_by_name<&make_plan, "q_cu_seqlens", "q_counts", "k_cu_seqlens", "k_counts", "allow", "batch", "modalities">(
        m, "attention_plan");
    define<float>(m, "cross_modal_attention_f32", "cross_modal_attention_backward_f32");
    define<uint16_t>(m, "cross_modal_attention_bf16", "cross_modal_attention_backward_bf16");
}

}  // namespace m4k
