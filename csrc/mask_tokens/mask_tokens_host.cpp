// The CUDA block programs of mask_tokens on the host, for tests.
#include "common/block_host.h"
#include "mask_tokens/draw_block.h"
#include "mask_tokens/fill_block.h"

namespace m4k::masking {
namespace {

constexpr int32_t kPoison = 0x5a5a5a5a;  // shared memory holds anything when a block begins

int checked_threads(int threads, int usual, int least) {
    const int chosen = threads ? threads : usual;
    if (chosen % kWarp != 0 || chosen < least) {
        throw std::invalid_argument("mask_tokens: threads must be whole warps and hold a sample");
    }
    return chosen;
}

}  // namespace

void draw_on_host(const DrawArgs& args, uint64_t seed, int threads) {
    threads = checked_threads(threads, kDrawThreads, kSides * args.plan.modalities);
    run_on_host(1, threads, seed, [&](HostBlock& ctx) {
        std::vector<int32_t> words(static_cast<size_t>(DrawShared::kArrays * threads + kSides), kPoison);
        draw_block(ctx, args, DrawShared(words.data(), threads));
    });
}

void fill_on_host(const FillArgs& args, uint64_t seed, int threads) {
    threads = checked_threads(threads, fill_threads(args.plan), kWarp);
    run_on_host(std::max<int64_t>(args.batch, 1), threads, seed, [&](HostBlock& ctx) {
        std::vector<uint32_t> words(static_cast<size_t>(FillShared::words(args.plan.slots)), kPoison);
        std::vector<FillModality> modality(static_cast<size_t>(args.plan.modalities));
        fill_block(ctx, args, FillShared(words.data(), args.plan.slots, modality.data()));
    });
}

void ranks_on_host(const uint32_t* keys, int n, int32_t* ranks) {
    std::vector<uint32_t> padded(static_cast<size_t>((n + kWarp - 1) / kWarp * kWarp), 0xffffffffu);
    std::copy_n(keys, n, padded.begin());
    for (int i = 0; i < n; ++i) ranks[i] = rank_of(padded.data(), n, i);
}

}  // namespace m4k::masking
