// A matrix in memory that kernels read, whatever its dtype and strides.
#pragma once

#include <cstdint>

namespace m4k {

struct MatrixSource {
    const void* data;  // float, or bfloat16 as uint16_t
    bool is_bf16;
    bool round;           // floats are rounded to bfloat16
    int64_t row, column;  // strides in elements
    bool gelu = false;    // what is read is GELU of the floats, before it is rounded

    int64_t offset(int64_t i, int64_t j) const { return i * row + j * column; }
    // The matrix from element (i, j) on.
    MatrixSource at(int64_t i, int64_t j) const {
        MatrixSource part = *this;
        part.data = static_cast<const char*>(data) + offset(i, j) * (is_bf16 ? 2 : 4);
        return part;
    }
    MatrixSource transposed() const {
        MatrixSource other = *this;
        other.row = column;
        other.column = row;
        return other;
    }
};

}  // namespace m4k
