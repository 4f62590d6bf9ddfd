// CPU kernels of quantize_coords and dequantize_coords, compiled once per SIMD level: the loops are written so that the
// compiler vectorises them with the level's registers.
#include <bit>
#include <cmath>

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

// c / canvas. By a power of two, such as M4's 256, the product with the reciprocal has the same bits and takes fewer
// cycles.
template <bool kPowerOfTwo, typename T, typename V>
inline __attribute__((always_inline)) V share(const QuantizeArgs<T>& a, V c) {
    if constexpr (kPowerOfTwo) {
        return c * (T(1) / a.canvas);
    } else {
        return c / a.canvas;
    }
}

template <typename T>
bool is_power_of_two(T canvas) {
    int exponent;
    return std::frexp(canvas, &exponent) == T(0.5) && exponent > -100 && exponent < 100;  // its reciprocal is normal
}

template <typename V, typename T>
inline __attribute__((always_inline)) V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

inline __attribute__((always_inline)) void store(int64_t* p, Vec<int64_t> v) { __builtin_memcpy(p, &v, sizeof(v)); }

template <typename V>
inline __attribute__((always_inline)) Vec<int64_t> token(V t) {
    return __builtin_convertvector(__builtin_convertvector(t, Vec<int32_t>), Vec<int64_t>);
}

// Eight bytes of 0 or 1, one a lane. By shifts, since GCC 12 converts vectors of bytes one by one.
inline __attribute__((always_inline)) Vec<int64_t> spread_bytes(const uint8_t* p) {
    static_assert(std::endian::native == std::endian::little);
    uint64_t bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return Vec<int64_t>(((Vec<uint64_t>{} + bytes) >> Vec<uint64_t>{0, 8, 16, 24, 32, 40, 48, 56}) & 1);
}

template <bool kPowerOfTwo, typename T>
inline __attribute__((always_inline)) void quantize_block(const QuantizeArgs<T>& a, const Affine<T>& affine,
                                                          const T* xy, const uint8_t* visible, int64_t* out) {
    const auto low = load<Vec<T>>(xy), high = load<Vec<T>>(xy + kBlock);
    const Vec<T> x = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14) * affine.scale_x + affine.offset_x;
    const Vec<T> y = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15) * affine.scale_y + affine.offset_y;
    store(out, token(token_of_share(x, share<kPowerOfTwo>(a, x), a.max_token)));
    store(out + a.joints, token(token_of_share(y, share<kPowerOfTwo>(a, y), a.max_token)));
    const auto inside = __builtin_convertvector(coord_inside(x, a.canvas) & coord_inside(y, a.canvas), Vec<int64_t>);
    store(out + 2 * a.joints, spread_bytes(visible) & inside);
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

template <bool kPowerOfTwo, typename T>
inline void quantize_sample(const QuantizeArgs<T>& a, int64_t i) {
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
        quantize_block<kPowerOfTwo>(a, affine, xy + 2 * at, visible + at, out + at);
    }
}

int thread_count(int64_t total_joints, int threads) {
    const int64_t useful = total_joints / kMinJointsPerThread;
    return useful < 1 ? 1 : (useful < threads ? static_cast<int>(useful) : threads);
}

template <bool kPowerOfTwo, typename T>
void quantize_samples(const QuantizeArgs<T> a, int64_t first, int64_t last) {  // by value: no store can change it
    for (int64_t i = first; i < last; ++i) quantize_sample<kPowerOfTwo>(a, i);
}

template <typename T>
void quantize_all(const QuantizeArgs<T>& a) {
    const auto samples = is_power_of_two(a.canvas) ? quantize_samples<true, T> : quantize_samples<false, T>;
    const int threads = thread_count(a.n * a.joints, a.threads);
    if (threads == 1) return samples(a, 0, a.n);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) samples(a, a.n * t / threads, a.n * (t + 1) / threads);
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
