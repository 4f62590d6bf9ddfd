// Coordinate quantisation: the arithmetic of one coordinate, shared by every compiled backend.
// The specification is m4kernels/ops/quantize_coords/reference.py. Compile with FMA contraction off: a fused
// xy * scale + offset rounds once where the reference rounds twice, and ties would fall differently.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/hostdevice.h"
#include "common/simd.h"

namespace m4k {

// The token of canvas coordinate c: clamp(round_half_even(c / canvas * (bins - 1)), 0, bins - 1), 0 for a non-finite c.
// int32_t holds it because bins <= 2^24.
template <typename T>
M4K_HD int32_t coord_token(T c, T canvas, T max_token) {
    T t = std::rint(c / canvas * max_token);
    t = t > T(0) ? t : T(0);  // also takes NaN, for which the comparison is false
    t = t < max_token ? t : max_token;
    return static_cast<int32_t>(c - c == T(0) ? t : T(0));
}

// 1 where c is finite and within [0, canvas].
template <typename T>
M4K_HD int32_t coord_inside(T c, T canvas) {
    return (c >= T(0) ? 1 : 0) & (c <= canvas ? 1 : 0);  // canvas is finite, and NaN fails both
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
