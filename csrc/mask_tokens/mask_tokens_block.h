// mask_tokens on a GPU: two launches, no atomics. draw_block.h is one block that draws all budgets and scans them into
// cu_seqlens; fill_block.h, a block a sample, chooses the positions by rank and compacts them. Here is what they share.
#pragma once

#include "common/block.h"
#include "common/philox.h"
#include "mask_tokens/mask_tokens.h"

namespace m4k::masking {

// The plan is a kernel argument, read from the constant bank, so it has a fixed size: 1.3 KB of the 4 KB of arguments.
inline constexpr int kBlockModalities = 64;
// Ranking a modality of n tokens takes n^2 comparisons: 2,048 of them 74,000 cycles of a multiprocessor (128
// lanes, 2.25 instructions a comparison).
inline constexpr int kBlockSeqLen = 2048;
// Slots of a row: its tokens, each modality filled up to a warp. Their keys and masks take 34 KB of shared memory,
// within the 48 KB that need no opting in.
inline constexpr int kBlockSlots = 8192;

// One thread a (sample, side, modality): the largest block there is, since a batch of 96 samples of 4 modalities is 768
// threads and a single block has to wait for memory and for divisions by itself.
inline constexpr int kDrawThreads = 1024;
inline constexpr int kMaxFillThreads = 1024;

// Index of a side: inputs, targets.
inline constexpr int kSides = 2;

struct BlockPlan {
    int32_t modalities;
    int32_t slots;
    int32_t lens[kBlockModalities];
    int32_t offsets[kBlockModalities];         // where a modality begins in a row of tokens
    int32_t first_slot[kBlockModalities + 1];  // ... and in a row of slots: multiples of kWarp
    int16_t rows[kSides][kBlockModalities];    // row of the modality's alpha in gamma, or kNever
    int32_t low[kSides], high[kSides];         // tokens to draw
    const int32_t* gamma;                      // (alphas, 2, kKnots)
    const int32_t* exp2;                       // (1025,)
};

// One slot a thread: a sample of M4 has 640, and with one block a sample on 132 multiprocessors the fastest is to bring
// all its warps at once.
inline int fill_threads(const BlockPlan& plan) { return plan.slots < kMaxFillThreads ? plan.slots : kMaxFillThreads; }

struct DrawArgs {
    BlockPlan plan;
    Draw draw;
    int64_t batch;
    const int64_t* lengths;       // (B, M) or null for full
    int32_t* counts[kSides];      // (B, M)
    int32_t* cu_seqlens[kSides];  // (B + 1,)
    int64_t sizes[kSides];        // tokens that the outputs hold
    int32_t* totals;              // (3,): tokens of each side, 1 if a length is out of range; or null
    bool* fits;                   // (1,): whether lengths and sizes are right; or null
};

struct FillArgs {
    BlockPlan plan;
    Draw draw;
    int64_t batch;
    const int64_t* lengths;
    const bool* fits;  // or null for true
    const void* tokens;
    TokenType token_type;
    int64_t tokens_stride;
    Packed sides[kSides];
};

M4K_BLOCK PhiloxBlock random_block(const Draw& draw, int64_t sample, uint32_t c0) {
    const uint64_t id = static_cast<uint64_t>(draw.sample_ids[sample]);
    PhiloxBlock block{{c0, draw.epoch, static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)}};
    philox4x32_10(block, static_cast<uint32_t>(draw.seed), static_cast<uint32_t>(draw.seed >> 32));
    return block;
}

// The tokens that modality m of a sample has; kept in range, so that a wrong length cannot do more than be reported.
M4K_BLOCK int32_t available_tokens(const BlockPlan& plan, const int64_t* lengths, int64_t sample, int m) {
    if (!lengths) return plan.lens[m];
    const int64_t length = lengths[sample * plan.modalities + m];
    return static_cast<int32_t>(length < 0 ? 0 : (length > plan.lens[m] ? plan.lens[m] : length));
}

// The kernels, and the same programs on the host with threads and blocks in an order that depends on the seed;
// `threads` 0 is as many as on the device.
void draw_cuda(const DrawArgs& args, const Target& target);
void fill_cuda(const FillArgs& args, const Target& target);
void draw_on_host(const DrawArgs& args, uint64_t seed, int threads);
void fill_on_host(const FillArgs& args, uint64_t seed, int threads);
// ranks (n,) of one modality's n keys.
void ranks_on_host(const uint32_t* keys, int n, int32_t* ranks);

}  // namespace m4k::masking
