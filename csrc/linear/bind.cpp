// Python signatures of the products of linear layers; Python has checked shapes, dtypes and strides.
#include "common/bind.h"

#include <pybind11/stl.h>

#include <tuple>

#include "common/pointer.h"
#include "linear/linear.h"

namespace m4k {
namespace {

using MatrixTuple = std::tuple<uintptr_t, bool, int64_t, int64_t>;  // address (0: none), bfloat16, strides

MatrixSource source(const MatrixTuple& matrix, bool round, bool gelu) {
    const auto [data, is_bf16, row, column] = matrix;
    return {as_ptr<const void>(data), is_bf16, round, row, column, gelu};
}

// GELU of bfloat16 numbers is no bfloat16 number: `round` applies to it, too.
LinearArgs arguments(MatrixTuple a, MatrixTuple b, bool a_gelu, bool b_gelu, bool round, bool bf16_products,
                     uintptr_t bias, MatrixTuple residual, MatrixTuple slope_at, uintptr_t out, bool out_is_bf16,
                     int64_t rows, int64_t columns, int64_t depth, uintptr_t workspace, int threads) {
    return {source(a, round, a_gelu),
            source(b, round, b_gelu),
            bf16_products,
            as_ptr<const float>(bias),
            source(residual, false, false),
            source(slope_at, false, false),
            as_ptr<void>(out),
            out_is_bf16,
            rows,
            columns,
            depth,
            as_ptr<float>(workspace),
            threads};
}

void product(MatrixTuple a, MatrixTuple b, bool a_gelu, bool b_gelu, bool round, bool bf16_products, uintptr_t bias,
             MatrixTuple residual, MatrixTuple slope_at, uintptr_t out, bool out_is_bf16, int64_t rows, int64_t columns,
             int64_t depth, uintptr_t workspace, int threads) {
    linear(arguments(a, b, a_gelu, b_gelu, round, bf16_products, bias, residual, slope_at, out, out_is_bf16, rows,
                     columns, depth, workspace, threads));
}

int64_t workspace_floats(bool bf16_products, int64_t rows, int64_t columns, int64_t depth, int threads) {
    LinearArgs args{};
    args.bf16_products = bf16_products;
    args.rows = rows;
    args.columns = columns;
    args.depth = depth;
    args.threads = threads;
    return LinearLayout(args).floats;
}

}  // namespace

void bind_linear(py::module_& m) {
    def_by_name<&product, "a", "b", "a_gelu", "b_gelu", "round", "bf16_products", "bias", "residual", "slope_at", "out",
                "out_is_bf16", "rows", "columns", "depth", "workspace", "threads">(m, "linear");
    def_by_name<&workspace_floats, "bf16_products", "rows", "columns", "depth", "threads">(m, "linear_workspace");
}

}  // namespace m4k
