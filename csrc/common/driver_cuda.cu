#include "common/launch.cuh"

namespace m4k {

int cuda_driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "m4kernels", "find the driver's version");
    return version;
}

}  // namespace m4k
