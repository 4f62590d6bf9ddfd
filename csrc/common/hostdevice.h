// M4K_HD marks the op mathematics that the CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define M4K_HD __host__ __device__ __forceinline__
#else
#define M4K_HD inline __attribute__((always_inline))
#endif
