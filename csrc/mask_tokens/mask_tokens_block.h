// Block programs of mask_tokens. draw_block is one block that draws all budgets and scans them into cu_seqlens;
// fill_block, a block a sample, chooses the positions by rank and compacts them. Two launches, no atomics.
// The specification is m4kernels/ops/mask_tokens/reference.py.
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

// Arrays with an entry a thread; those of several are reached by arithmetic, as an array of pointers would be kept in
// local memory.
struct DrawShared {
    static constexpr int kArrays = 10;
    int threads;
    int32_t* gamma;
    int32_t* weight;
    int32_t* budget;
    int32_t* count;
    int32_t* leftovers;  // (4, threads)
    int32_t* scans;      // (2, threads)
    int32_t* before;     // (kSides,) tokens of the samples of earlier passes

    // words: (kArrays * threads + kSides,).
    M4K_BLOCK DrawShared(int32_t* words, int threads)
        : threads(threads),
          gamma(words),
          weight(words + threads),
          budget(words + 2 * threads),
          count(words + 3 * threads),
          leftovers(words + 4 * threads),
          scans(words + 8 * threads),
          before(words + kArrays * threads) {}
    M4K_BLOCK int32_t* leftover(int word) const { return leftovers + word * threads; }
    M4K_BLOCK int32_t* scan(int turn) const { return scans + turn * threads; }
};

// A thread of draw_block is one modality of one side of one sample. `peers` is the first thread of its side.
struct DrawThread {
    bool active;
    int64_t sample;
    int side, m, peers;

    M4K_BLOCK DrawThread(const DrawArgs& a, int64_t first_sample, int samples, int thread) {
        const int modalities = a.plan.modalities, of_sample = kSides * modalities;
        const int local = thread / of_sample, lane = thread - local * of_sample;
        sample = first_sample + local;
        side = lane >= modalities;
        m = lane - side * modalities;
        peers = thread - m;
        active = local < samples && sample < a.batch;
    }
};

template <typename Ctx>
M4K_BLOCK void draw_block(Ctx& ctx, const DrawArgs& a, const DrawShared& s) {
    const BlockPlan& plan = a.plan;
    const int modalities = plan.modalities;
    const int samples = ctx.threads() / (kSides * modalities);  // of a pass
    typename Ctx::template PerThread<int32_t> size(ctx), left(ctx), won(ctx), bad(ctx);
    const auto table = [&](int row) { return plan.gamma + int64_t{2} * kKnots * row; };

    ctx.for_each_thread([&](int t) {
        if (t < kSides) {
            s.before[t] = 0;
            a.cu_seqlens[t][0] = 0;
        }
    });
    ctx.sync();
    for (int64_t first = 0; first < a.batch; first += samples) {
        const auto me = [&](int t) { return DrawThread(a, first, samples, t); };
        ctx.for_each_thread([&](int t) {  // the sizes, and a Gamma draw of every modality
            const DrawThread i = me(t);
            if (!i.active) return;
            const PhiloxBlock sizes = random_block(a.draw, i.sample, counter0(kSizes, 0, 0));
            const uint32_t word = i.side ? sizes.x[1] : sizes.x[0];
            size[t] = static_cast<int32_t>(uniform(word, plan.low[i.side], plan.high[i.side]));
            const int row = plan.rows[i.side][i.m];
            if (row == kNever) return;
            const uint32_t purpose = i.side ? kTargetDirichlet : kInputDirichlet;
            s.gamma[t] = log_gamma_draw(random_block(a.draw, i.sample, counter0(purpose, i.m, 0)).x[0], table(row));
        });
        ctx.sync();
        ctx.for_each_thread([&](int t) {  // weights, of which the largest is 2^30
            const DrawThread i = me(t);
            if (!i.active) return;
            int32_t most = INT32_MIN;
            for (int k = 0; k < modalities; ++k) {
                const int32_t g = plan.rows[i.side][k] == kNever ? INT32_MIN : s.gamma[i.peers + k];
                most = g > most ? g : most;
            }
            s.weight[t] = 0;
            if (plan.rows[i.side][i.m] == kNever) return;
            const uint32_t distance = static_cast<uint32_t>(most) - static_cast<uint32_t>(s.gamma[t]);
            s.weight[t] = static_cast<int32_t>(exp2_weight(distance, plan.exp2));
        });
        ctx.sync();
        ctx.for_each_thread([&](int t) {  // budgets, rounded down
            const DrawThread i = me(t);
            if (!i.active) return;
            uint64_t total = 0;
            for (int k = 0; k < modalities; ++k) total += static_cast<uint32_t>(s.weight[i.peers + k]);
            const uint64_t share = static_cast<uint64_t>(size[t]) * static_cast<uint32_t>(s.weight[t]);
            s.budget[t] = static_cast<int32_t>(share / total);
        });
        ctx.sync();
        ctx.for_each_thread([&](int t) {  // what is left over: fewer tokens than modalities
            const DrawThread i = me(t);
            left[t] = won[t] = 0;
            if (!i.active) return;
            left[t] = size[t];
            for (int k = 0; k < modalities; ++k) left[t] -= s.budget[i.peers + k];
        });
        ctx.sync();
        for (int round = 0; 4 * round < modalities - 1; ++round) {  // four leftovers, one random block, at a time
            ctx.for_each_thread([&](int t) {
                const DrawThread i = me(t);
                const int row = i.active ? plan.rows[i.side][i.m] : kNever;
                if (row == kNever || left[t] <= 4 * round) return;
                const uint32_t purpose = i.side ? kTargetLeftovers : kInputLeftovers;
                const uint32_t c0 = counter0(purpose, i.m, static_cast<uint32_t>(round));
                const PhiloxBlock block = random_block(a.draw, i.sample, c0);
                M4K_UNROLL
                for (int word = 0; word < 4; ++word) {
                    if (4 * round + word < left[t]) s.leftover(word)[t] = log_gamma_draw(block.x[word], table(row));
                }
            });
            ctx.sync();
            ctx.for_each_thread([&](int t) {  // each goes to the largest draw, the lowest modality on a tie
                const DrawThread i = me(t);
                if (!i.active || plan.rows[i.side][i.m] == kNever) return;
                for (int word = 0; word < 4 && 4 * round + word < left[t]; ++word) {
                    const int32_t mine = s.leftover(word)[t];
                    bool wins = true;
                    for (int k = 0; k < modalities; ++k) {
                        if (plan.rows[i.side][k] == kNever) continue;
                        const int32_t other = s.leftover(word)[i.peers + k];
                        wins &= k < i.m ? other < mine : other <= mine;
                    }
                    won[t] += wins;
                }
            });
            ctx.sync();
        }
        ctx.for_each_thread([&](int t) {
            if (me(t).active) s.budget[t] += won[t];
        });
        ctx.sync();
        ctx.for_each_thread([&](int t) {  // inputs make do with what there is, targets with what the inputs leave
            const DrawThread i = me(t);
            if (!i.active) return;
            const int32_t available = available_tokens(plan, a.lengths, i.sample, i.m);
            if (a.lengths) bad[t] |= a.lengths[i.sample * modalities + i.m] != available;
            const int of_inputs = t - i.side * modalities;
            const int32_t inputs = s.budget[of_inputs] < available ? s.budget[of_inputs] : available;
            const int32_t rest = available - inputs, targets = s.budget[t] < rest ? s.budget[t] : rest;
            s.count[t] = i.side ? targets : inputs;
            a.counts[i.side][i.sample * modalities + i.m] = s.count[t];
        });
        ctx.sync();

        // Running sums of the samples' lengths. Now a thread is a sample of one side.
        const auto side_of = [&](int t) { return t >= samples; };
        const auto local_of = [&](int t) { return t - side_of(t) * samples; };
        ctx.for_each_thread([&](int t) {
            if (t >= kSides * samples) return;
            const int local = local_of(t), row = (kSides * local + side_of(t)) * modalities;
            int32_t sum = 0;
            for (int m = 0; first + local < a.batch && m < modalities; ++m) sum += s.count[row + m];
            s.scan(0)[t] = sum;
        });
        ctx.sync();
        int turn = 0;
        for (int distance = 1; distance < samples; distance *= 2, turn ^= 1) {
            ctx.for_each_thread([&](int t) {
                if (t >= kSides * samples) return;
                const int32_t more = local_of(t) >= distance ? s.scan(turn)[t - distance] : 0;
                s.scan(turn ^ 1)[t] = s.scan(turn)[t] + more;
            });
            ctx.sync();
        }
        ctx.for_each_thread([&](int t) {
            if (t >= kSides * samples || first + local_of(t) >= a.batch) return;
            const int side = side_of(t);
            a.cu_seqlens[side][first + local_of(t) + 1] = s.before[side] + s.scan(turn)[t];
        });
        ctx.sync();
        ctx.for_each_thread([&](int t) {
            if (t < kSides) s.before[t] += s.scan(turn)[(t + 1) * samples - 1];
        });
        ctx.sync();
    }
    const bool bad_length = ctx.any_thread([&](int t) { return bad[t] != 0; });
    ctx.for_each_thread([&](int t) {
        if (t != 0) return;
        if (a.totals) {
            a.totals[0] = s.before[0];
            a.totals[1] = s.before[1];
            a.totals[2] = bad_length;
        }
        if (a.fits) *a.fits = !bad_length && s.before[0] <= a.sizes[0] && s.before[1] <= a.sizes[1];
    });
    ctx.sync();
}

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

// The kernels, and the same programs on the host with threads and blocks in an order that depends on the seed;
// `threads` 0 is as many as on the device.
void draw_cuda(const DrawArgs& args, const Target& target);
void fill_cuda(const FillArgs& args, const Target& target);
void draw_on_host(const DrawArgs& args, uint64_t seed, int threads);
void fill_on_host(const FillArgs& args, uint64_t seed, int threads);
// ranks (n,) of one modality's n keys.
void ranks_on_host(const uint32_t* keys, int n, int32_t* ranks);

}  // namespace m4k::masking
