#include "common/bind.h"

#include "common/simd.h"

namespace m4k {

void bind_simd(py::module_& m) {
    m.def("simd_level", &simd_level_name);
    m.def("set_simd_level", &set_simd_level);
}

}  // namespace m4k
