// Block program of mask_tokens: one block draws the budgets of all samples and scans them into cu_seqlens. The
// specification is m4kernels/ops/mask_tokens/reference.py.
#pragma once

#include "mask_tokens/mask_tokens_block.h"

namespace m4k::masking {

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

}  // namespace m4k::masking
