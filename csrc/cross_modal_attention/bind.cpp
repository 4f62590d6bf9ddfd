// Python signatures of the attention kernels; Python has checked shapes, dtypes and segments.
#include "common/bind.h"

#include <tuple>

#include "common/pointer.h"
#include "cross_modal_attention/cross_modal_attention.h"
#include "cross_modal_attention/plan.h"

namespace m4k {
namespace {

using View = std::tuple<uintptr_t, int64_t, int64_t>;  // address; elements from token to token, from head to head
using ShapeTuple = std::tuple<int64_t, int64_t, int, int, int, double, int>;

template <typename T>
Heads<T> heads(const View& view) {
    return {as_ptr<T>(std::get<0>(view)), std::get<1>(view), std::get<2>(view)};
}

AttentionShape shape_of(const ShapeTuple& s) {
    return {std::get<0>(s), std::get<1>(s), std::get<2>(s),
            std::get<3>(s), std::get<4>(s), static_cast<float>(std::get<5>(s)),
            std::get<6>(s)};
}

template <typename T>
void forward(const PlanBuilder& plan, const ShapeTuple& shape, const View& q, const View& k, const View& v,
             const View& out, uintptr_t lse, uintptr_t workspace, int64_t workspace_step) {
    cross_modal_attention(plan.plan(),
                          ForwardArgs<T>{shape_of(shape), heads<const T>(q), heads<const T>(k), heads<const T>(v),
                                         heads<T>(out), as_ptr<float>(lse), as_ptr<float>(workspace), workspace_step});
}

template <typename T>
void backward(const PlanBuilder& plan, const ShapeTuple& shape, const View& grad_out, const View& q, const View& k,
              const View& v, uintptr_t lse, const View& grad_q, const View& grad_k, const View& grad_v,
              uintptr_t workspace, int64_t workspace_step) {
    cross_modal_attention_backward(
        plan.plan(), BackwardArgs<T>{shape_of(shape), heads<const T>(grad_out), heads<const T>(q), heads<const T>(k),
                                     heads<const T>(v), as_ptr<const float>(lse), heads<T>(grad_q), heads<T>(grad_k),
                                     heads<T>(grad_v), as_ptr<float>(workspace), workspace_step});
}

}  // namespace

void bind_cross_modal_attention(py::module_& m) {
    py::class_<PlanBuilder>(m, "AttentionPlan")
        .def(py::init([](uintptr_t q_cu_seqlens, uintptr_t q_counts, uintptr_t k_cu_seqlens, uintptr_t k_counts,
                         uintptr_t allow, int64_t batch, int modalities) {
            return PlanBuilder({as_ptr<const int32_t>(q_cu_seqlens), as_ptr<const int32_t>(q_counts)},
                               {as_ptr<const int32_t>(k_cu_seqlens), as_ptr<const int32_t>(k_counts)},
                               as_ptr<const bool>(allow), batch, modalities);
        }))
        // (forward, backward): floats of workspace for each thread
        .def("workspace", [](const PlanBuilder& builder, int head_dim) {
            const AttentionPlan plan = builder.plan();
            const AttentionWorkspace size(plan.longest_k, plan.k_groups, head_dim);
            return std::tuple(size.forward, size.backward);
        });
    m.def("cross_modal_attention_f32", &forward<float>, release_gil);
    m.def("cross_modal_attention_bf16", &forward<uint16_t>, release_gil);
    m.def("cross_modal_attention_backward_f32", &backward<float>, release_gil);
    m.def("cross_modal_attention_backward_bf16", &backward<uint16_t>, release_gil);
}

}  // namespace m4k
