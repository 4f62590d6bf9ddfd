#include "common/block_host.h"

namespace m4k {

std::vector<int64_t> host_block_order(int64_t blocks, int threads, uint64_t seed, bool syncs) {
    std::vector<int64_t> order;
    run_on_host(blocks, threads, seed, [&](HostBlock& ctx) {
        ctx.for_each_thread([&](int t) { order.push_back(ctx.block() * threads + t); });
        if (syncs) ctx.sync();
        ctx.for_each_thread([](int) {});
    });
    return order;
}

}  // namespace m4k
