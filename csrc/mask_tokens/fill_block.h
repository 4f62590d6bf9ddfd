// Block program of mask_tokens: a block chooses the positions of a sample by the ranks of their keys and compacts them.
// The specification is m4kernels/ops/mask_tokens/reference.py.
#pragma once

#include "mask_tokens/mask_tokens_block.h"

namespace m4k::masking {

// One modality of the block's sample.
struct FillModality {
    int32_t available;
    int32_t counts[kSides];
    int64_t places[kSides];  // where its tokens begin in the packed outputs
};

struct FillShared {
    static constexpr int words(int slots) { return slots + kSides * (slots / kWarp); }
    uint32_t* keys;          // (slots,)
    uint32_t* inputs;        // (slots / kWarp,) bit i of a word: the slot is an input ...
    uint32_t* targets;       // ... a target
    FillModality* modality;  // (modalities,)

    // words: (words(slots),), 16-byte aligned.
    M4K_BLOCK FillShared(uint32_t* words, int slots, FillModality* modality)
        : keys(words), inputs(words + slots), targets(words + slots + slots / kWarp), modality(modality) {}
};

M4K_BLOCK int modality_of_slot(const BlockPlan& plan, int slot) {
    int m = 0;
    while (slot >= plan.first_slot[m + 1]) ++m;
    return m;
}

// count -= a < b, as a 64-bit subtraction whose borrow comes out of the upper word: two instructions on a GPU, where a
// comparison and an addition take three.
M4K_BLOCK void count_down_if_less(uint32_t& count, uint32_t a, uint32_t b) {
    const uint64_t wide = (uint64_t{count} << 32 | a) - b;
    count = static_cast<uint32_t>(wide >> 32);
}

// How many of the modality's keys come before key i, in (key, position) order. Keys (n,) are filled up with the largest
// to whole warps, which as they come last never count.
M4K_BLOCK int rank_of(const uint32_t* keys, int n, int i) {
    const uint32_t key = keys[i];
    const int own = i / kWarp * kWarp;       // where the warp's own keys begin: only among these may j < i or j > i
    uint32_t after[4] = {}, before[4] = {};  // minus the keys found there; four sums, so that additions do not queue
    for (int j = 0; j < own; j += 4) {
        const Quad other = load_quad(keys + j);
        M4K_UNROLL
        for (int k = 0; k < 4; ++k) count_down_if_less(after[k], key, other.x[k]);  // an equal key comes before
    }
    int rank = own;
    M4K_UNROLL
    for (int j = own; j < own + kWarp; j += 4) {
        const Quad other = load_quad(keys + j);
        M4K_UNROLL
        for (int k = 0; k < 4; ++k) rank += other.x[k] < key || (other.x[k] == key && j + k < i);
    }
    for (int j = own + kWarp; j < n; j += 4) {
        const Quad other = load_quad(keys + j);
        M4K_UNROLL
        for (int k = 0; k < 4; ++k) count_down_if_less(before[k], other.x[k], key);
    }
    M4K_UNROLL
    for (int k = 0; k < 4; ++k) rank += static_cast<int>(after[k] - before[k]);
    return rank;
}

M4K_BLOCK int64_t load_token(const FillArgs& a, int64_t index) {
    switch (a.token_type) {
        case TokenType::u16:
            return static_cast<const uint16_t*>(a.tokens)[index];
        case TokenType::i32:
            return static_cast<const int32_t*>(a.tokens)[index];
        default:
            return static_cast<const int64_t*>(a.tokens)[index];
    }
}

// Block b fills in sample b; all blocks share the work on the tails. There may be more blocks than samples.
template <typename Ctx>
M4K_BLOCK void fill_block(Ctx& ctx, const FillArgs& a, const FillShared& s) {
    const BlockPlan& plan = a.plan;
    const int modalities = plan.modalities;
    const int64_t sample = ctx.block();
    if (a.fits && !*a.fits) return;  // cu_seqlens would lead past the outputs; Python raises the error

    if (sample < a.batch) {
        ctx.for_each_thread([&](int t) {  // keys, and where each modality goes
            for (int slot = 4 * t; slot < plan.slots; slot += 4 * ctx.threads()) {
                const int m = modality_of_slot(plan, slot), i = slot - plan.first_slot[m];
                const int32_t n = available_tokens(plan, a.lengths, sample, m);
                PhiloxBlock block = random_block(a.draw, sample, counter0(kPositions, m, static_cast<uint32_t>(i) / 4));
                M4K_UNROLL
                for (int k = 0; k < 4; ++k) block.x[k] = i + k < n ? block.x[k] : 0xffffffffu;
                store_quad(s.keys + slot, {{block.x[0], block.x[1], block.x[2], block.x[3]}});
            }
            for (int m = t; m < modalities; m += ctx.threads()) {
                FillModality& info = s.modality[m];
                info.available = available_tokens(plan, a.lengths, sample, m);
                for (int side = 0; side < kSides; ++side) {
                    const int32_t* counts = a.sides[side].counts + sample * modalities;
                    info.counts[side] = counts[m];
                    info.places[side] = a.sides[side].cu_seqlens[sample];
                    for (int k = 0; k < m; ++k) info.places[side] += counts[k];
                }
            }
        });
        ctx.sync();
        for (int base = 0; base < plan.slots; base += ctx.threads()) {
            ctx.for_each_thread_voting(
                [&](int t) -> uint32_t {
                    const int slot = base + t;
                    if (slot >= plan.slots) return kUnused;
                    const int m = modality_of_slot(plan, slot), i = slot - plan.first_slot[m];
                    const FillModality& info = s.modality[m];
                    const int used = info.counts[0] + info.counts[1];
                    if (used == 0 || i >= info.available) return kUnused;
                    const int rank = rank_of(s.keys + plan.first_slot[m], info.available, i);
                    return rank < info.counts[0] ? kInput : (rank < used ? kTarget : kUnused);
                },
                [&](int t, Votes votes) {
                    if ((base + t) % kWarp != 0 || base + t >= plan.slots) return;
                    s.inputs[(base + t) / kWarp] = votes.one;
                    s.targets[(base + t) / kWarp] = votes.two;
                });
            ctx.sync();
        }
        ctx.for_each_thread([&](int t) {  // a token goes as far in as there are chosen ones before it
            for (int slot = t; slot < plan.slots; slot += ctx.threads()) {
                const int word = slot / kWarp;
                const uint32_t bit = 1u << (slot % kWarp);
                const int side = (s.targets[word] & bit) != 0;
                const uint32_t* masks = side ? s.targets : s.inputs;
                if (!(masks[word] & bit)) continue;
                const int m = modality_of_slot(plan, slot), i = slot - plan.first_slot[m];
                int64_t place = s.modality[m].places[side] + count_bits(masks[word] & (bit - 1));
                for (int w = plan.first_slot[m] / kWarp; w < word; ++w) place += count_bits(masks[w]);
                const Packed& out = a.sides[side];
                out.ids[place] = load_token(a, sample * a.tokens_stride + plan.offsets[m] + i);
                out.positions[place] = i;
                out.modalities[place] = m;
            }
        });
        ctx.sync();
    }
    ctx.for_each_thread([&](int t) {
        for (int side = 0; side < kSides; ++side) {
            const Packed& out = a.sides[side];
            const int64_t first = out.cu_seqlens[a.batch] + ctx.block() * ctx.threads() + t;
            for (int64_t i = first; i < out.size; i += ctx.blocks() * ctx.threads()) {
                out.ids[i] = out.fill;
                out.positions[i] = 0;
                out.modalities[i] = 0;
            }
        }
    });
    ctx.sync();
}

}  // namespace m4k::masking
