// Tensors cross the boundary as addresses (tensor.data_ptr()); this turns one back into a typed pointer.
#pragma once

#include <cstdint>

namespace m4k {
template <typename T>
T* as_ptr(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
}  // namespace m4k
