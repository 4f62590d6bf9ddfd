// Running a block program (block.h) on the host, for tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "common/block.h"

namespace m4k {

// The context of a block program on the host.
class HostBlock {
  public:
    HostBlock(int64_t block, int64_t blocks, int threads, std::mt19937_64& random)
        : block_(block), blocks_(blocks), random_(random), order_(static_cast<size_t>(threads)) {
        std::iota(order_.begin(), order_.end(), 0);
    }
    int64_t block() const { return block_; }
    int64_t blocks() const { return blocks_; }
    int threads() const { return static_cast<int>(order_.size()); }

    // A value of each thread; threads may not look at each other's.
    template <typename T>
    class PerThread {
      public:
        explicit PerThread(const HostBlock& ctx) : values_(static_cast<size_t>(ctx.threads())) {}
        T& operator[](int thread) { return values_.at(static_cast<size_t>(thread)); }

      private:
        std::vector<T> values_;
    };

    template <typename F>
    void for_each_thread(F f) {
        begin_phase();
        std::shuffle(order_.begin(), order_.end(), random_);
        for (int thread : order_) f(thread);
    }

    // A phase in which every thread votes with the two lowest bits of vote(thread) and then gets use(thread, votes)
    // with the votes of its warp.
    template <typename Vote, typename Use>
    void for_each_thread_voting(Vote vote, Use use) {
        begin_phase();
        for (int first = 0; first < threads(); first += kWarp) {
            std::vector<int> lanes(static_cast<size_t>(std::min(kWarp, threads() - first)));
            std::iota(lanes.begin(), lanes.end(), 0);
            std::shuffle(lanes.begin(), lanes.end(), random_);
            Votes votes{};
            for (int lane : lanes) {
                const uint32_t bits = vote(first + lane);
                votes.one |= (bits & 1u) << lane;
                votes.two |= (bits >> 1 & 1u) << lane;
            }
            for (int lane : lanes) use(first + lane, votes);
        }
    }

    // Whether f(thread) is true in any thread; known to all. Its barrier is included.
    template <typename F>
    bool any_thread(F f) {
        bool any = false;
        for_each_thread([&](int thread) { any |= f(thread); });
        sync();
        return any;
    }

    void sync() { in_phase_ = false; }

  private:
    void begin_phase() {
        if (in_phase_) throw std::logic_error("block program: two phases without a sync between them");
        in_phase_ = true;
    }

    int64_t block_, blocks_;
    std::mt19937_64& random_;
    std::vector<int> order_;
    bool in_phase_ = false;
};

// Runs program(ctx) for every block of a grid, in an order that depends on the seed.
template <typename Program>
void run_on_host(int64_t blocks, int threads, uint64_t seed, Program program) {
    if (threads < 1) throw std::invalid_argument("block program: at least one thread is needed");
    std::mt19937_64 random(seed);
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::shuffle(order.begin(), order.end(), random);
    for (int64_t block : order) {
        HostBlock ctx(block, blocks, threads, random);
        program(ctx);
    }
}

// For tests of HostBlock itself: block * threads + thread in the order in which a phase runs; `syncs` false leaves out
// the sync before the next phase.
std::vector<int64_t> host_block_order(int64_t blocks, int threads, uint64_t seed, bool syncs);

}  // namespace m4k
