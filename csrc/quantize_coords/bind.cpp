// Python signatures of the quantize_coords kernels; Python has checked shapes, dtypes and contiguity.
#include "common/bind.h"

#include "common/pointer.h"
#include "quantize_coords/quantize_coords.h"

namespace m4k {
namespace {

template <typename T>
void quantize(uintptr_t xy, uintptr_t visible, uintptr_t scale, uintptr_t offset, int64_t scale_step,
              int64_t offset_step, uintptr_t tokens, int64_t n, int64_t joints, double canvas, int64_t bins,
              int threads) {
    quantize_coords(QuantizeArgs<T>{as_ptr<const T>(xy), as_ptr<const uint8_t>(visible), as_ptr<const T>(scale),
                                    as_ptr<const T>(offset), scale_step, offset_step, as_ptr<int64_t>(tokens), n,
                                    joints, static_cast<T>(canvas), static_cast<T>(bins - 1), threads});
}

}  // namespace

void bind_quantize_coords(py::module_& m) {
    m.def("quantize_coords_f32", &quantize<float>, release_gil);
    m.def("quantize_coords_f64", &quantize<double>, release_gil);
    m.def(
        "dequantize_coords",
        [](uintptr_t tokens, uintptr_t xy, uintptr_t visible, int64_t n, int64_t joints, double canvas, int64_t bins,
           int threads) {
            dequantize_coords(DequantizeArgs{as_ptr<const int64_t>(tokens), as_ptr<float>(xy), as_ptr<bool>(visible), n,
                                             joints, static_cast<float>(canvas), static_cast<float>(bins - 1),
                                             threads});
        },
        release_gil);
}

}  // namespace m4k
