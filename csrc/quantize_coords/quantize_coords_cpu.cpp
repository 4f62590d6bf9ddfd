// CPU kernels of quantize_coords and dequantize_coords, compiled once per SIMD level: the loops are written so that the
// compiler vectorises them with the level's registers.
#include "quantize_coords/quantize_coords.h"

namespace m4k::M4K_SIMD_NS {
namespace {

// Below this many joints a second thread costs more than it saves (about 5 us to wake a thread, 1 ns a joint).
constexpr int64_t kMinJointsPerThread = 8192;

template <typename T>
void quantize_sample(const QuantizeArgs<T>& a, int64_t i) {
    const int64_t joints = a.joints;
    const T* xy = a.xy + i * joints * 2;
    const bool* visible = a.visible + i * joints;
    const T* scale = a.scale + i * a.scale_step;
    const T* offset = a.offset + i * a.offset_step;
    const T sx = scale[0], sy = scale[1], ox = offset[0], oy = offset[1];
    int64_t* out = a.tokens + i * 3 * joints;
    for (int64_t j = 0; j < joints; ++j) {
        const auto x = quantize_coord<T>(xy[2 * j], sx, ox, a.canvas, a.max_token);
        const auto y = quantize_coord<T>(xy[2 * j + 1], sy, oy, a.canvas, a.max_token);
        out[j] = x.token;
        out[joints + j] = y.token;
        out[2 * joints + j] = visible[j] & x.inside & y.inside;
    }
}

int thread_count(int64_t total_joints, int threads) {
    const int64_t useful = total_joints / kMinJointsPerThread;
    return useful < 1 ? 1 : (useful < threads ? static_cast<int>(useful) : threads);
}

template <typename T>
void quantize_all(const QuantizeArgs<T>& a) {
    const int threads = thread_count(a.n * a.joints, a.threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < a.n; ++i) quantize_sample(a, i);
}

}  // namespace

void quantize_f32(const QuantizeArgs<float>& args) { quantize_all(args); }
void quantize_f64(const QuantizeArgs<double>& args) { quantize_all(args); }

void dequantize(const DequantizeArgs& a) {
    const int threads = thread_count(a.n * a.joints, a.threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < a.n; ++i) {
        const int64_t* tokens = a.tokens + i * 3 * a.joints;
        float* xy = a.xy + i * 2 * a.joints;
        bool* visible = a.visible + i * a.joints;
        for (int64_t j = 0; j < a.joints; ++j) {
            xy[2 * j] = dequantize_coord(tokens[j], a.canvas, a.max_token);
            xy[2 * j + 1] = dequantize_coord(tokens[a.joints + j], a.canvas, a.max_token);
            visible[j] = tokens[2 * a.joints + j] != 0;
        }
    }
}

}  // namespace m4k::M4K_SIMD_NS

#if defined(M4K_SIMD_PORTABLE)
namespace m4k {
void quantize_coords(const QuantizeArgs<float>& args) { M4K_CALL_LEVEL(quantize_f32, (args)); }
void quantize_coords(const QuantizeArgs<double>& args) { M4K_CALL_LEVEL(quantize_f64, (args)); }
void dequantize_coords(const DequantizeArgs& args) { M4K_CALL_LEVEL(dequantize, (args)); }
}  // namespace m4k
#endif
