// Launching a block program (block.h) on a CUDA device; only for *_cuda.cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/block.h"

namespace m4k {

// The context of a block program on the device.
struct DeviceBlock {
    template <typename T>
    struct PerThread {
        T value;
        M4K_BLOCK explicit PerThread(const DeviceBlock&) : value{} {}
        M4K_BLOCK T& operator[](int) { return value; }
    };

    M4K_BLOCK int64_t block() const { return blockIdx.x; }
    M4K_BLOCK int64_t blocks() const { return gridDim.x; }
    M4K_BLOCK int threads() const { return static_cast<int>(blockDim.x); }

    template <typename F>
    M4K_BLOCK void for_each_thread(F f) {
        f(static_cast<int>(threadIdx.x));
    }

    template <typename Vote, typename Use>
    M4K_BLOCK void for_each_thread_voting(Vote vote, Use use) {
        const int thread = static_cast<int>(threadIdx.x);
        const uint32_t bits = vote(thread);
        use(thread, Votes{__ballot_sync(0xffffffffu, bits & 1u), __ballot_sync(0xffffffffu, bits & 2u)});
    }

    template <typename F>
    M4K_BLOCK bool any_thread(F f) {
        return __syncthreads_or(f(static_cast<int>(threadIdx.x)));
    }

    M4K_BLOCK void sync() { __syncthreads(); }
};

// Throws where a call failed. Nothing here waits for the device, so an earlier kernel's failure may show only now.
inline void check(cudaError_t status, const char* op, const char* what) {
    if (status == cudaSuccess) return;
    std::string message = std::string(op) + ": CUDA failed to " + what + ": " + cudaGetErrorString(status) + " (" +
                          cudaGetErrorName(status) + ")";
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
        message += "; build the extension for this GPU: `M4KERNELS_CUDA_ARCHS=<architecture> pip install -e .`";
    } else if (status == cudaErrorInsufficientDriver) {
        message += "; update the driver, or build the extension with the CUDA toolkit of the driver's version";
    }
    throw std::runtime_error(message);
}

// Launches kernel<<<blocks, threads, shared_bytes>>>(args) on the target. The extension has a CUDA runtime of its own
// (linked statically), so it sees to the device itself.
template <typename... Params, typename... Args>
void launch(const char* op, const Target& target, void (*kernel)(Params...), int64_t blocks, int threads,
            size_t shared_bytes, const Args&... args) {
    int current = -1;
    check(cudaGetDevice(&current), op, "find the current device");
    if (current != target.device) check(cudaSetDevice(target.device), op, "select the device");
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(target.stream)>>>(args...);
    check(cudaGetLastError(), op, "launch its kernel");
}

}  // namespace m4k
