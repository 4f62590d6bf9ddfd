// Python signatures of the linear_cross_entropy kernels; Python has checked shapes, dtypes and contiguity.
#include "common/bind.h"

#include <pybind11/stl.h>

#include <tuple>

#include "common/pointer.h"
#include "linear_cross_entropy/fused.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "linear_cross_entropy/whole.h"

namespace m4k {
namespace {

template <typename T>
int64_t order(uintptr_t targets, uintptr_t vocab_limit, int limit_bytes, uintptr_t token_weight, int64_t tokens,
              int64_t classes, int64_t ignore_index, uintptr_t order, uintptr_t limit, uintptr_t scale) {
    return order_tokens(TokenArgs<T>{as_ptr<const int64_t>(targets), as_ptr<const void>(vocab_limit), limit_bytes,
                                     as_ptr<const T>(token_weight), tokens, classes, ignore_index},
                        OrderedTokens<T>{as_ptr<int64_t>(order), as_ptr<int64_t>(limit), as_ptr<T>(scale)});
}

template <typename T>
void pass(uintptr_t logits, uintptr_t order, uintptr_t limit, uintptr_t scale, uintptr_t targets, uintptr_t nll,
          uintptr_t correct, int64_t first, int64_t rows, int64_t width, bool gradient, int threads) {
    cross_entropy(LogitsArgs<T>{as_ptr<T>(logits), as_ptr<const int64_t>(order) + first,
                                as_ptr<const int64_t>(limit) + first, as_ptr<const T>(scale) + first,
                                as_ptr<const int64_t>(targets), as_ptr<T>(nll), as_ptr<bool>(correct), rows, width,
                                gradient, threads});
}

template <typename T>
void weighted_loss(uintptr_t order, uintptr_t scale, uintptr_t nll, int64_t count, uintptr_t out) {
    double loss = 0;
    for (int64_t i = 0; i < count; ++i) {
        loss += double(as_ptr<const T>(scale)[i]) * double(as_ptr<const T>(nll)[as_ptr<const int64_t>(order)[i]]);
    }
    *as_ptr<T>(out) = static_cast<T>(loss);
}

template <typename T>
void whole(uintptr_t logits, uintptr_t log_softmax, uintptr_t targets, uintptr_t nll, uintptr_t correct, int64_t tokens,
           int64_t classes) {
    whole_logits(WholeLogits<T>{as_ptr<const T>(logits), as_ptr<const T>(log_softmax), as_ptr<const int64_t>(targets),
                                as_ptr<T>(nll), as_ptr<bool>(correct), tokens, classes});
}

bool classes_only(uintptr_t targets, int64_t tokens, int64_t classes) {
    return are_classes(as_ptr<const int64_t>(targets), tokens, classes);
}

using ChunkTuple = std::tuple<int64_t, int64_t, int64_t>;  // first, rows, width

std::vector<ChunkTuple> plan(uintptr_t limit, int64_t count, int64_t bytes, int64_t per_logit, int64_t per_row,
                             int64_t max_rows) {
    std::vector<ChunkTuple> chunks;
    for (const Chunk& c :
         plan_chunks(as_ptr<const int64_t>(limit), count, ChunkBudget{bytes, per_logit, per_row, max_rows})) {
        chunks.emplace_back(c.first, c.rows, c.width);
    }
    return chunks;
}

template <typename T>
void define(py::module_& m, const char* order_name, const char* pass_name, const char* loss_name) {
    def_by_name<&order<T>, "targets", "vocab_limit", "limit_bytes", "token_weight", "tokens", "classes", "ignore_index",
                "order", "limit", "scale">(m, order_name);
    def_by_name<&pass<T>, "logits", "order", "limit", "scale", "targets", "nll", "correct", "first", "rows", "width",
                "gradient", "threads">(m, pass_name);
    def_by_name<&weighted_loss<T>, "order", "scale", "nll", "count", "out">(m, loss_name);
}

std::tuple<int64_t, int64_t, int64_t> fused_plan(int64_t count, int64_t dim, int64_t classes, bool x_grad,
                                                 bool weight_grad, bool weight_is_bf16, int64_t weight_row,
                                                 int64_t weight_column, bool round, bool bf16_products, int64_t bytes,
                                                 int threads) {
    const bool copies = copies_weight({nullptr, weight_is_bf16, round, weight_row, weight_column}, bf16_products);
    const FusedSize size{dim, classes, x_grad, weight_grad, copies, bf16_products, threads};
    const FusedPlan plan = plan_fused(count, size, bytes / 4);
    return {plan.rows, plan.floats, plan.logits};
}

void fused(uintptr_t x, bool x_is_bf16, int64_t x_row, int64_t x_column, uintptr_t weight, bool weight_is_bf16,
           int64_t weight_row, int64_t weight_column, bool round, bool bf16_products, uintptr_t targets,
           uintptr_t order, uintptr_t limit, uintptr_t scale, int64_t count, int64_t dim, int64_t classes,
           uintptr_t nll, uintptr_t correct, uintptr_t dx, uintptr_t dweight, uintptr_t workspace, int64_t floats,
           int64_t rows, int threads) {
    fused_cross_entropy(
        FusedArgs{FusedSource{as_ptr<const void>(x), x_is_bf16, round, x_row, x_column},
                  FusedSource{as_ptr<const void>(weight), weight_is_bf16, round, weight_row, weight_column},
                  bf16_products, as_ptr<const int64_t>(targets),
                  OrderedTokens<float>{as_ptr<int64_t>(order), as_ptr<int64_t>(limit), as_ptr<float>(scale)}, count,
                  dim, classes, as_ptr<float>(nll), as_ptr<bool>(correct), as_ptr<float>(dx), as_ptr<float>(dweight),
                  as_ptr<float>(workspace), floats, threads},
        rows);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
    define<float>(m, "lce_order_f32", "lce_pass_f32", "lce_loss_f32");
    define<double>(m, "lce_order_f64", "lce_pass_f64", "lce_loss_f64");
    def_by_name<&classes_only, "targets", "tokens", "classes">(m, "lce_are_classes");
    def_by_name<&whole<float>, "logits", "log_softmax", "targets", "nll", "correct", "tokens", "classes">(
        m, "lce_whole_f32");
    def_by_name<&whole<double>, "logits", "log_softmax", "targets", "nll", "correct", "tokens", "classes">(
        m, "lce_whole_f64");
    def_by_name<&plan, "limit", "count", "bytes", "per_logit", "per_row", "max_rows">(m, "lce_plan");
    def_by_name<&fused_plan, "count", "dim", "classes", "x_grad", "weight_grad", "weight_is_bf16", "weight_row",
                "weight_column", "round", "bf16_products", "bytes", "threads">(m, "lce_fused_plan");
    def_by_name<&fused, "x", "x_is_bf16", "x_row", "x_column", "weight", "weight_is_bf16", "weight_row",
                "weight_column", "round", "bf16_products", "targets", "order", "limit", "scale", "count", "dim",
                "classes", "nll", "correct", "dx", "dweight", "workspace", "floats", "rows", "threads">(m, "lce_fused");
}

}  // namespace m4k
