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

void dequantize(uintptr_t tokens, uintptr_t xy, uintptr_t visible, int64_t n, int64_t joints, double canvas,
                int64_t bins, int threads) {
    dequantize_coords(DequantizeArgs{as_ptr<const int64_t>(tokens), as_ptr<float>(xy), as_ptr<bool>(visible), n, joints,
                                     static_cast<float>(canvas), static_cast<float>(bins - 1), threads});
}

template <typename T>
void define_quantize(py::module_& m, const char* name) {
    def_by_name<&quantize<T>, "xy", "visible", "scale", "offset", "scale_step", "offset_step", "tokens", "n", "joints",
                "canvas", "bins", "threads">(m, name);
}

}  // namespace

void bind_quantize_coords(py::module_& m) {
    define_quantize<float>(m, "quantize_coords_f32");
    define_quantize<double>(m, "quantize_coords_f64");
    def_by_name<&dequantize, "tokens", "xy", "visible", "n", "joints", "canvas", "bins", "threads">(
        m, "dequantize_coords");
}

}  // namespace m4k
