// Python signatures of the CUDA kernels of quantize_coords, and of their block programs on the host.
#include "common/bind.h"
#include "common/pointer.h"
#include "quantize_coords/quantize_coords_block.h"

namespace m4k {
namespace {

// The last two arguments say where to run: device and stream, or for the host the order of threads (a seed) and their
// number, which is fixed here.
template <typename T, auto Run>
void quantize(uintptr_t xy, uintptr_t visible, uintptr_t scale, uintptr_t offset, int64_t scale_step,
              int64_t offset_step, uintptr_t tokens, int64_t n, int64_t joints, double canvas, int64_t bins,
              int64_t where, uint64_t how) {
    Run(QuantizeArgs<T>{as_ptr<const T>(xy), as_ptr<const uint8_t>(visible), as_ptr<const T>(scale),
                        as_ptr<const T>(offset), scale_step, offset_step, as_ptr<int64_t>(tokens), n, joints,
                        static_cast<T>(canvas), static_cast<T>(bins - 1), 1},
        where, how);
}

template <auto Run>
void dequantize(uintptr_t tokens, uintptr_t xy, uintptr_t visible, int64_t n, int64_t joints, double canvas,
                int64_t bins, int64_t where, uint64_t how) {
    Run(DequantizeArgs{as_ptr<const int64_t>(tokens), as_ptr<float>(xy), as_ptr<bool>(visible), n, joints,
                       static_cast<float>(canvas), static_cast<float>(bins - 1), 1},
        where, how);
}

template <typename T, auto Run, Name Where, Name How>
void define_quantize(py::module_& m, const char* name) {
    def_by_name<&quantize<T, Run>, "xy", "visible", "scale", "offset", "scale_step", "offset_step", "tokens", "n",
                "joints", "canvas", "bins", Where, How>(m, name);
}

template <auto Run, Name Where, Name How>
void define_dequantize(py::module_& m, const char* name) {
    def_by_name<&dequantize<Run>, "tokens", "xy", "visible", "n", "joints", "canvas", "bins", Where, How>(m, name);
}

constexpr auto quantize_host = [](const auto& args, int64_t seed, uint64_t) {
    quantize_coords_on_host(args, static_cast<uint64_t>(seed));
};
constexpr auto dequantize_host = [](const DequantizeArgs& args, int64_t seed, uint64_t) {
    dequantize_coords_on_host(args, static_cast<uint64_t>(seed));
};
#if M4K_CUDA
constexpr auto quantize_device = [](const auto& args, int64_t device, uint64_t stream) {
    quantize_coords_cuda(args, Target{static_cast<int>(device), static_cast<uintptr_t>(stream)});
};
constexpr auto dequantize_device = [](const DequantizeArgs& args, int64_t device, uint64_t stream) {
    dequantize_coords_cuda(args, Target{static_cast<int>(device), static_cast<uintptr_t>(stream)});
};
#endif

}  // namespace

void bind_quantize_coords_cuda(py::module_& m) {
    define_quantize<float, quantize_host, "order", "threads">(m, "quantize_coords_f32_host");
    define_quantize<double, quantize_host, "order", "threads">(m, "quantize_coords_f64_host");
    define_dequantize<dequantize_host, "order", "threads">(m, "dequantize_coords_host");
#if M4K_CUDA
    define_quantize<float, quantize_device, "device", "stream">(m, "quantize_coords_f32_cuda");
    define_quantize<double, quantize_device, "device", "stream">(m, "quantize_coords_f64_cuda");
    define_dequantize<dequantize_device, "device", "stream">(m, "dequantize_coords_cuda");
#endif
}

}  // namespace m4k
