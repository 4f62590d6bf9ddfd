// CUDA kernels of mask_tokens: the block programs of draw_block.h and fill_block.h.
#include "common/launch.cuh"
#include "mask_tokens/draw_block.h"
#include "mask_tokens/fill_block.h"

namespace m4k::masking {
namespace {

__global__ void __launch_bounds__(kDrawThreads, 1) draw_kernel(const __grid_constant__ DrawArgs args) {
    __shared__ int32_t words[DrawShared::kArrays * kDrawThreads + kSides];
    DeviceBlock ctx;
    draw_block(ctx, args, DrawShared(words, kDrawThreads));
}

__global__ void __launch_bounds__(kMaxFillThreads, 1) fill_kernel(const __grid_constant__ FillArgs args) {
    extern __shared__ __align__(16) uint32_t words[];
    __shared__ FillModality modality[kBlockModalities];
    DeviceBlock ctx;
    fill_block(ctx, args, FillShared(words, args.plan.slots, modality));
}

}  // namespace

void draw_cuda(const DrawArgs& args, const Target& target) {
    launch("mask_tokens", target, draw_kernel, 1, kDrawThreads, 0, args);
}

void fill_cuda(const FillArgs& args, const Target& target) {
    const size_t shared_bytes = FillShared::words(args.plan.slots) * sizeof(uint32_t);
    // Without samples one block is left to write the tails.
    launch("mask_tokens", target, fill_kernel, args.batch > 0 ? args.batch : 1, fill_threads(args.plan), shared_bytes,
           args);
}

}  // namespace m4k::masking
