// Coordinate quantisation: the arithmetic of one coordinate, shared by every compiled backend.
// The specification is m4kernels/ops/quantize_coords/reference.py. Compile with FMA contraction off: a fused
// xy * scale + offset rounds once where the reference rounds twice, and ties would fall differently.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/hostdevice.h"
#include "common/simd.h"

namespace m4k {

// The functions below take T = float or double, or a vector of either (__attribute__((vector_size))): all they use
// works lane by lane on both.

// Nearest integer, ties to even, for 0 <= t <= 2^24: adding 2^(mantissa bits) makes the addition itself round. From
// there on every t is an integer already.
M4K_HD constexpr float rounding_shift(float) { return 8388608.0f; }
M4K_HD constexpr double rounding_shift(double) { return 4503599627370496.0; }

template <typename T, typename Scalar>
M4K_HD T round_half_even(T t, Scalar shift) {
    const T s = T{} + shift;
    return t < s ? (t + s) - s : t;
}

// The token of canvas coordinate c, given c / canvas: clamp(round_half_even(c / canvas * (bins - 1)), 0, bins - 1), 0
// for a non-finite c. Clamping first gives the same, because the bounds are integers.
template <typename T, typename Scalar>
M4K_HD T token_of_share(T c, T share, Scalar max_token) {
    const T last = T{} + max_token;
    T t = share * max_token;
    t = t > T{} ? t : T{};  // also takes NaN, for which the comparison is false
    t = t < last ? t : last;
    t = c - c == T{} ? t : T{};
    return round_half_even(t, rounding_shift(max_token));
}

template <typename T, typename Scalar>
M4K_HD T coord_token(T c, Scalar canvas, Scalar max_token) {
    return token_of_share(c, T(c / canvas), max_token);
}

// True (-1 in a lane of a vector) where c is finite and within [0, canvas].
template <typename T, typename Scalar>
M4K_HD auto coord_inside(T c, Scalar canvas) {
    return (c >= T{}) & (c <= T{} + canvas);  // canvas is finite, and NaN fails both
}

template <typename T>
M4K_HD T dequantize_coord(int64_t token, T canvas, T max_token) {
    return static_cast<T>(token) / max_token * canvas;
}

// Shapes: xy (n, joints, 2) contiguous; visible (n, joints); scale, offset (n, 2), or (2,) when their step is 0,
// or null for 1 and 0;
// tokens (n, 3 * joints).
template <typename T>
struct QuantizeArgs {
    const T* xy;
    const uint8_t* visible;  // torch.bool: a byte of 0 or 1
    const T* scale;
    const T* offset;
    int64_t scale_step;  // elements from one sample's scale to the next: 2 or 0
    int64_t offset_step;
    int64_t* tokens;
    int64_t n;
    int64_t joints;
    T canvas;
    T max_token;
    int threads;
};

struct DequantizeArgs {
    const int64_t* tokens;
    float* xy;
    bool* visible;
    int64_t n;
    int64_t joints;
    float canvas;
    float max_token;
    int threads;
};

M4K_DECLARE_LEVELS(void, quantize_f32, (const QuantizeArgs<float>& args))
M4K_DECLARE_LEVELS(void, quantize_f64, (const QuantizeArgs<double>& args))
M4K_DECLARE_LEVELS(void, dequantize, (const DequantizeArgs& args))

// The entry points: run the level in use.
void quantize_coords(const QuantizeArgs<float>& args);
void quantize_coords(const QuantizeArgs<double>& args);
void dequantize_coords(const DequantizeArgs& args);

}  // namespace m4k
