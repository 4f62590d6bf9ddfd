// CUDA kernels of quantize_coords and dequantize_coords: the block programs of quantize_coords_block.h, a tile a block.
#include "common/launch.cuh"
#include "quantize_coords/quantize_coords_block.h"

namespace m4k {
namespace {

template <typename T>
__global__ void __launch_bounds__(kTileThreads) quantize_kernel(const QuantizeArgs<T> args, const Tiling tiling) {
    __shared__ __align__(16) int32_t staged[3 * kTileJoints];
    DeviceBlock ctx;
    quantize_block(ctx, args, tiling, staged);
}

__global__ void __launch_bounds__(kTileThreads) dequantize_kernel(const DequantizeArgs args, const Tiling tiling) {
    __shared__ __align__(16) float staged[3 * kTileJoints];
    DeviceBlock ctx;
    dequantize_block(ctx, args, tiling, staged);
}

template <typename T>
void quantize(const QuantizeArgs<T>& args, const Target& target) {
    const Tiling tiling = make_tiling(args.n, args.joints);
    if (tiling.tiles > 0) {
        launch("quantize_coords", target, quantize_kernel<T>, tiling.tiles, kTileThreads, 0, args, tiling);
    }
}

}  // namespace

void quantize_coords_cuda(const QuantizeArgs<float>& args, const Target& target) { quantize(args, target); }
void quantize_coords_cuda(const QuantizeArgs<double>& args, const Target& target) { quantize(args, target); }

void dequantize_coords_cuda(const DequantizeArgs& args, const Target& target) {
    const Tiling tiling = make_tiling(args.n, args.joints);
    if (tiling.tiles > 0) {
        launch("dequantize_coords", target, dequantize_kernel, tiling.tiles, kTileThreads, 0, args, tiling);
    }
}

}  // namespace m4k
