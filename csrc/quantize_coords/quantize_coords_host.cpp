// The CUDA block programs of quantize_coords and dequantize_coords on the host, for tests.
#include "common/block_host.h"
#include "quantize_coords/quantize_coords_block.h"

namespace m4k {
namespace {

template <typename T>
void quantize(const QuantizeArgs<T>& args, uint64_t seed) {
    const Tiling tiling = make_tiling(args.n, args.joints);
    run_on_host(tiling.tiles, kTileThreads, seed, [&](HostBlock& ctx) {
        std::vector<int32_t> staged(3 * kTileJoints, INT32_MIN);
        quantize_block(ctx, args, tiling, staged.data());
    });
}

}  // namespace

void quantize_coords_on_host(const QuantizeArgs<float>& args, uint64_t seed) { quantize(args, seed); }
void quantize_coords_on_host(const QuantizeArgs<double>& args, uint64_t seed) { quantize(args, seed); }

void dequantize_coords_on_host(const DequantizeArgs& args, uint64_t seed) {
    const Tiling tiling = make_tiling(args.n, args.joints);
    run_on_host(tiling.tiles, kTileThreads, seed, [&](HostBlock& ctx) {
        std::vector<float> staged(3 * kTileJoints, -1.0f);
        dequantize_block(ctx, args, tiling, staged.data());
    });
}

}  // namespace m4k
