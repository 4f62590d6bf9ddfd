// Block programs: the work of one CUDA block, written once for the device and for the host.
//
// A block program is a function template over a context `ctx`. Between barriers it does one phase for all threads:
//
//     ctx.for_each_thread([&](int t) { shared.values[t] = ...; });
//     ctx.sync();
//
// On the device (launch.cuh) the phase runs once in each thread and sync is __syncthreads. On the host (HostBlock in
// block_host.h) the phase is a loop over the threads in a random order, so that tests and sanitizers see the very
// program that the GPU runs. Rules that keep the two alike:
//   - every phase ends with a sync; HostBlock throws where one is missing;
//   - in a phase no thread reads what another one writes in it;
//   - code between the phases is the same for all threads: it depends on the arguments and on block() only;
//   - what a thread keeps from phase to phase is in a Ctx::PerThread.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define M4K_BLOCK __device__ __forceinline__
#define M4K_UNROLL _Pragma("unroll")
#else
#define M4K_BLOCK inline
#define M4K_UNROLL
#endif

namespace m4k {

inline constexpr int kWarp = 32;

// The newest CUDA that the driver supports, such as 13000 for 13.0; 0 without a driver. Needs no GPU.
int cuda_driver_version();

// Where a kernel goes: Python passes the current stream of the tensors' device.
struct Target {
    int device;
    uintptr_t stream;
};

// Bit i of `one`, of `two`: whether lane i of the warp voted with bit 0, bit 1.
struct Votes {
    uint32_t one, two;
};

// Four words that are loaded and stored at once; 16-byte aligned.
struct Quad {
    uint32_t x[4];
};

M4K_BLOCK Quad load_quad(const uint32_t* p) {
    Quad quad;
#if defined(__CUDA_ARCH__)
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    quad = {{v.x, v.y, v.z, v.w}};
#else
    std::memcpy(&quad, p, sizeof quad);
#endif
    return quad;
}

M4K_BLOCK void store_quad(uint32_t* p, const Quad& quad) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint4*>(p) = make_uint4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]);
#else
    std::memcpy(p, &quad, sizeof quad);
#endif
}

M4K_BLOCK int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

}  // namespace m4k
