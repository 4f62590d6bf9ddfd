// What every <op>/bind.cpp needs; bindings.cpp calls the functions declared here.
#pragma once

#include <pybind11/pybind11.h>

#include "common/named.h"

namespace m4k {
namespace py = pybind11;

using namespace py::literals;  // "name"_a

using release_gil_t = py::call_guard<py::gil_scoped_release>;
inline constexpr release_gil_t release_gil{};

void bind_simd(py::module_& m);
void bind_adamw_step(py::module_& m);
void bind_block(py::module_& m);
void bind_embedding(py::module_& m);
void bind_linear(py::module_& m);
void bind_linear_cross_entropy(py::module_& m);
void bind_segments(py::module_& m);
void bind_cross_modal_attention(py::module_& m);
void bind_mask_tokens(py::module_& m);
void bind_mask_tokens_cuda(py::module_& m);
void bind_quantize_coords(py::module_& m);
void bind_quantize_coords_cuda(py::module_& m);

}  // namespace m4k
