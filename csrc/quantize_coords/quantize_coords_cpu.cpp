// CPU kernels of quantize_coords and dequantize_coords, compiled once per SIMD level: the loops are written so that the
// compiler vectorises them with the level's registers.
#include "quantize_coords/quantize_coords.h"

namespace m4k::M4K_SIMD_NS {
namespace {

// Below this many joints a second thread costs more than it saves (about 5 us to wake a thread, 1 ns a joint).
constexpr int64_t kMinJointsPerThread = 8192;

// Joints handled at once: one AVX2 register of floats. Vector types say what loops left to the compiler did not achieve
// (GCC 12: scalar code, 90 ns a sample of 13 joints).
constexpr int64_t kBlock = 8;
template <typename T>
using Vec __attribute__((vector_size(kBlock * sizeof(T)))) = T;

template <typename T>
struct Affine {
    T scale_x, scale_y, offset_x, offset_y;
};

template <typename V, typename T>
inline __attribute__((always_inline)) V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

template <typename V>
inline __attribute__((always_inline)) void store(int64_t* p, V v) {
    const auto wide = __builtin_convertvector(v, Vec<int64_t>);
    __builtin_memcpy(p, &wide, sizeof(wide));
}

template <typename T>
inline __attribute__((always_inline)) void quantize_block(const QuantizeArgs<T>& a, const Affine<T>& affine,
                                                          const T* xy, const uint8_t* visible, int64_t* out) {
    const auto low = load<Vec<T>>(xy), high = load<Vec<T>>(xy + kBlock);
    const Vec<T> x = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14) * affine.scale_x + affine.offset_x;
    const Vec<T> y = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15) * affine.scale_y + affine.offset_y;
    store(out, __builtin_convertvector(coord_token(x, a.canvas, a.max_token), Vec<int32_t>));
    store(out + a.joints, __builtin_convertvector(coord_token(y, a.canvas, a.max_token), Vec<int32_t>));
    const auto inside = __builtin_convertvector(coord_inside(x, a.canvas) & coord_inside(y, a.canvas), Vec<int32_t>);
    store(out + 2 * a.joints, __builtin_convertvector(load<Vec<uint8_t>>(visible), Vec<int32_t>) & inside);
}

template <typename T>
inline void quantize_joint(const QuantizeArgs<T>& a, const Affine<T>& affine, const T* xy, uint8_t visible,
                           int64_t* out) {
    const T x = xy[0] * affine.scale_x + affine.offset_x;
    const T y = xy[1] * affine.scale_y + affine.offset_y;
    out[0] = static_cast<int64_t>(coord_token(x, a.canvas, a.max_token));
    out[a.joints] = static_cast<int64_t>(coord_token(y, a.canvas, a.max_token));
    out[2 * a.joints] = visible & coord_inside(x, a.canvas) & coord_inside(y, a.canvas);
}

template <typename T>
void quantize_sample(const QuantizeArgs<T>& a, int64_t i) {
    const int64_t joints = a.joints;
    Affine<T> affine{T(1), T(1), T(0), T(0)};
    if (a.scale != nullptr) {
        affine.scale_x = a.scale[i * a.scale_step];
        affine.scale_y = a.scale[i * a.scale_step + 1];
    }
    if (a.offset != nullptr) {
        affine.offset_x = a.offset[i * a.offset_step];
        affine.offset_y = a.offset[i * a.offset_step + 1];
    }
    const T* xy = a.xy + i * joints * 2;
    const uint8_t* visible = a.visible + i * joints;
    int64_t* out = a.tokens + i * 3 * joints;
    if (joints < kBlock) {
        for (int64_t j = 0; j < joints; ++j) quantize_joint(a, affine, xy + 2 * j, visible[j], out + j);
        return;
    }
    for (int64_t j = 0; j < joints; j += kBlock) {
        const int64_t at = j + kBlock <= joints ? j : joints - kBlock;  // the last block overlaps the one before
        quantize_block(a, affine, xy + 2 * at, visible + at, out + at);
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
