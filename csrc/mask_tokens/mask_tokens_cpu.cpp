// CPU kernel of mask_tokens, compiled once per SIMD level: counts first, so that the caller can allocate, then tokens.
#include <algorithm>

#include "mask_tokens/mask_tokens.h"
#include "mask_tokens/philox_cpu.h"
#include "mask_tokens/select_cpu.h"

namespace m4k::masking::M4K_SIMD_NS {
namespace {

// Samples for each thread, about half a millisecond of work. Waking another takes only 5 us on an idle machine, but
// where the cores are busy, as in a loader beside a training step, waiting for it costs a time slice: a batch of 96
// took 24 ms with two threads there (two Xeon cores, load 10) and 0.25 ms with one.
constexpr int64_t kSamplesPerThread = 256;

int thread_count(int64_t samples, int threads) {
    return static_cast<int>(std::clamp<int64_t>(samples / kSamplesPerThread, 1, threads));
}

Stream stream_of(const Draw& draw, int64_t sample) {
    const uint64_t id = static_cast<uint64_t>(draw.sample_ids[sample]);
    return {draw.seed, draw.epoch, static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)};
}

// Random blocks of listed counters.
class BlockList {
  public:
    BlockList() = default;
    void clear() { size_ = 0; }
    void add(uint32_t c0) { counters_[size_++] = c0; }
    void draw(const Stream& stream) {
        for (int i = 0; i < size_; i += kBatch) {
            uint32_t c0[kBatch] = {};
            for (int n = 0; n < std::min(kBatch, size_ - i); ++n) {
                c0[n / Lanes::kWidth * Lanes::kWidth + lane_of(n % Lanes::kWidth)] = counters_[i + n];
            }
            Lanes counters[kBatch / Lanes::kWidth];
            for (int r = 0; r < kBatch / Lanes::kWidth; ++r) counters[r] = Lanes::load(c0 + r * Lanes::kWidth);
            stream.blocks(counters, words_ + 4 * i);
        }
    }
    const uint32_t* block(int i) const { return words_ + 4 * i; }

  private:
    static constexpr int kMost = 1 + 2 * kMaxModalities;
    static constexpr int kBatch = 16;  // blocks drawn at once
    int size_ = 0;
    uint32_t counters_[kMost];
    uint32_t words_[4 * (kMost + kBatch)];
};

// Shares n tokens out by rounding down; returns how many are left over. `block(i)` is the random block of the i-th
// modality that takes part.
template <typename Block>
int64_t share_out(const Plan& plan, const Side& side, int64_t n, Block block, int64_t* budgets) {
    int32_t g[kMaxModalities];
    int64_t weights[kMaxModalities];
    const int playing = static_cast<int>(side.playing.size());
    int32_t most = INT32_MIN;
    for (int i = 0; i < playing; ++i) {
        g[i] = log_gamma_draw(block(i)[0], plan.gamma + int64_t{2} * kKnots * side.rows[side.playing[i]]);
        most = std::max(most, g[i]);
    }
    int64_t total = 0;
    for (int i = 0; i < playing; ++i) {
        weights[i] = exp2_weight(static_cast<uint32_t>(most) - static_cast<uint32_t>(g[i]), plan.exp2);
        total += weights[i];
    }
    int64_t left = n;
    for (int i = 0; i < playing; ++i) {
        const int64_t budget = n * weights[i] / total;
        budgets[side.playing[i]] = budget;
        left -= budget;
    }
    return left;
}

// Gives leftovers 4 q, 4 q + 1, ... below `left`, at most four, to the largest fresh draw each.
template <typename Block>
void give_leftovers(const Plan& plan, const Side& side, int64_t left, int64_t q, Block block, int64_t* budgets) {
    const int playing = static_cast<int>(side.playing.size());
    for (int64_t word = 0; word < std::min<int64_t>(4, left - 4 * q); ++word) {
        int winner = 0;
        int32_t most = INT32_MIN;
        for (int i = 0; i < playing; ++i) {
            const int32_t g =
                log_gamma_draw(block(i)[word], plan.gamma + int64_t{2} * kKnots * side.rows[side.playing[i]]);
            if (g > most) {
                most = g;
                winner = i;
            }
        }
        ++budgets[side.playing[winner]];
    }
}

// inputs, targets (M,) tokens of one sample with these lengths (M,).
void count_sample(const Plan& plan, const Stream& stream, const int64_t* lengths, int32_t* inputs, int32_t* targets) {
    BlockList blocks;
    const int modalities = static_cast<int>(plan.lens.size());
    const int playing_in = static_cast<int>(plan.inputs.playing.size());
    int64_t in[kMaxModalities], out[kMaxModalities];
    std::fill_n(in, modalities, 0);
    std::fill_n(out, modalities, 0);

    blocks.add(counter0(kSizes, 0, 0));
    for (int m : plan.inputs.playing) blocks.add(counter0(kInputDirichlet, m, 0));
    for (int m : plan.targets.playing) blocks.add(counter0(kTargetDirichlet, m, 0));
    blocks.draw(stream);
    const auto first_in = [&](int i) { return blocks.block(1 + i); };
    const auto first_out = [&](int i) { return blocks.block(1 + playing_in + i); };
    const int64_t n_in = uniform(blocks.block(0)[0], plan.inputs.low, plan.inputs.high);
    const int64_t n_out = uniform(blocks.block(0)[1], plan.targets.low, plan.targets.high);
    const int64_t left_in = share_out(plan, plan.inputs, n_in, first_in, in);
    const int64_t left_out = share_out(plan, plan.targets, n_out, first_out, out);

    for (int64_t q = 0; 4 * q < std::max(left_in, left_out); ++q) {
        blocks.clear();
        for (int m : plan.inputs.playing) blocks.add(counter0(kInputLeftovers, m, static_cast<uint32_t>(q)));
        for (int m : plan.targets.playing) blocks.add(counter0(kTargetLeftovers, m, static_cast<uint32_t>(q)));
        blocks.draw(stream);
        give_leftovers(plan, plan.inputs, left_in, q, [&](int i) { return blocks.block(i); }, in);
        give_leftovers(plan, plan.targets, left_out, q, [&](int i) { return blocks.block(playing_in + i); }, out);
    }
    for (int m = 0; m < modalities; ++m) {
        const int64_t available = lengths ? lengths[m] : plan.lens[m];
        in[m] = std::min(in[m], available);
        inputs[m] = static_cast<int32_t>(in[m]);
        targets[m] = static_cast<int32_t>(std::min(out[m], available - in[m]));
    }
}

// Makes cu_seqlens from counts; returns the total.
int64_t scan(const Packed& side, int64_t batch, int64_t modalities) {
    int64_t total = 0;
    for (int64_t b = 0; b < batch; ++b) {
        side.cu_seqlens[b] = static_cast<int32_t>(total);
        for (int64_t m = 0; m < modalities; ++m) total += side.counts[b * modalities + m];
    }
    side.cu_seqlens[batch] = static_cast<int32_t>(total);
    return total;
}

// Keys from `first` of a modality whose counters begin at c0: as many as N registers make.
template <int N>
void make_keys(const Stream& stream, const uint32_t* c0, uint32_t first, uint32_t* keys) {
    Lanes counters[N];
    for (int r = 0; r < N; ++r) {
        counters[r] = Lanes::load(c0) + Lanes::fill((first >> 2) + static_cast<uint32_t>(r * Lanes::kWidth));
    }
    stream.blocks(counters, keys + first);
}

// keys (groups(n) * kGroup,) of modality m, padded with kPad.
void position_keys(const Stream& stream, int m, int32_t n, uint32_t* keys) {
    constexpr int kRegisters = kGroup / (4 * Lanes::kWidth);  // in a group
    uint32_t c0[Lanes::kWidth];
    for (int k = 0; k < Lanes::kWidth; ++k) c0[lane_of(k)] = counter0(kPositions, m, k);
    const int32_t end = groups(n) * kGroup;
    int32_t first = 0;
    if constexpr (kRegisters == 1) {  // AVX-512 has the registers for more
        for (; first + 4 * kGroup <= end; first += 4 * kGroup) make_keys<4>(stream, c0, first, keys);
    }
    for (; first < end; first += kGroup) make_keys<kRegisters>(stream, c0, first, keys);
    std::fill(keys + n, keys + end, kPad);
}

// Appends the tokens at the set bits of a group to one side of the batch.
template <typename Token>
struct Writer {
    int64_t* ids;
    int64_t* positions;
    void take(const Token* tokens, int64_t first, uint64_t bits) {
        while (bits) {
            const int64_t position = first + std::countr_zero(bits);
            bits &= bits - 1;
            *ids++ = static_cast<int64_t>(tokens[position]);
            *positions++ = position;
        }
    }
};

template <typename Token>
void fill_sample(const Args& a, int64_t b, uint32_t* keys) {
    const Plan& plan = *a.plan;
    const int modalities = static_cast<int>(plan.lens.size());
    const Stream stream = stream_of(a.draw, b);
    int64_t at_in = a.inputs.cu_seqlens[b], at_out = a.targets.cu_seqlens[b];
    Writer<Token> in{a.inputs.ids + at_in, a.inputs.positions + at_in};
    Writer<Token> out{a.targets.ids + at_out, a.targets.positions + at_out};
    for (int m = 0; m < modalities; ++m) {
        const int64_t row = b * modalities + m;
        const int32_t inputs = a.inputs.counts[row], targets = a.targets.counts[row];
        if (inputs + targets == 0) continue;
        const int32_t n = a.lengths ? static_cast<int32_t>(a.lengths[row]) : plan.lens[m];
        const Token* tokens = static_cast<const Token*>(a.tokens) + b * a.tokens_stride + plan.offsets[m];
        position_keys(stream, m, n, keys);
        for_each_group(keys, n, inputs, targets, [&](int g, uint64_t is_input, uint64_t is_target) {
            in.take(tokens, int64_t{g} * kGroup, is_input);
            out.take(tokens, int64_t{g} * kGroup, is_target);
        });
        std::fill_n(a.inputs.modalities + at_in, inputs, m);
        std::fill_n(a.targets.modalities + at_out, targets, m);
        at_in += inputs;
        at_out += targets;
    }
}

template <typename Token>
void fill_all(const Args& a) {
    const int threads = thread_count(a.batch, a.threads);
    const int32_t longest = *std::max_element(a.plan->lens.begin(), a.plan->lens.end());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<uint32_t> keys(static_cast<size_t>(groups(longest)) * kGroup);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < a.batch; ++b) fill_sample<Token>(a, b, keys.data());
    }
    for (const Packed* side : {&a.inputs, &a.targets}) {
        const int64_t end = side->cu_seqlens[a.batch], tail = side->size - end;
        std::fill_n(side->ids + end, tail, side->fill);
        std::fill_n(side->positions + end, tail, 0);
        std::fill_n(side->modalities + end, tail, 0);
    }
}

}  // namespace

Totals count_tokens(const Args& a) {
    const Plan& plan = *a.plan;
    const int64_t modalities = static_cast<int64_t>(plan.lens.size());
    const int threads = thread_count(a.batch, a.threads);
    int64_t bad = INT64_MAX;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : bad) if (threads > 1)
    for (int64_t b = 0; b < a.batch; ++b) {
        const int64_t row = b * modalities;
        if (a.lengths) {
            for (int64_t m = 0; m < modalities; ++m) {
                if (a.lengths[row + m] < 0 || a.lengths[row + m] > plan.lens[m]) bad = std::min(bad, row + m);
            }
        }
        count_sample(plan, stream_of(a.draw, b), a.lengths ? a.lengths + row : nullptr, a.inputs.counts + row,
                     a.targets.counts + row);
    }
    if (bad != INT64_MAX) return {0, 0, bad};
    return {scan(a.inputs, a.batch, modalities), scan(a.targets, a.batch, modalities), -1};
}

void fill_tokens(const Args& a) {
    switch (a.token_type) {
        case TokenType::u16:
            return fill_all<uint16_t>(a);
        case TokenType::i32:
            return fill_all<int32_t>(a);
        case TokenType::i64:
            return fill_all<int64_t>(a);
    }
}

void select_roles(const uint32_t* keys, int32_t n, int32_t inputs, int32_t targets, uint8_t* roles) {
    std::vector<uint32_t> padded(static_cast<size_t>(groups(n)) * kGroup, kPad);
    std::copy_n(keys, n, padded.begin());
    for_each_group(padded.data(), n, inputs, targets, [&](int g, uint64_t is_input, uint64_t is_target) {
        for (int i = 0; i < std::min(kGroup, n - g * kGroup); ++i) {
            roles[g * kGroup + i] = (is_input >> i & 1) ? kInput : ((is_target >> i & 1) ? kTarget : kUnused);
        }
    });
}

}  // namespace m4k::masking::M4K_SIMD_NS

#if defined(M4K_SIMD_PORTABLE)
namespace m4k::masking {
Totals count_tokens(const Args& args) { M4K_CALL_LEVEL(count_tokens, (args)); }
void fill_tokens(const Args& args) { M4K_CALL_LEVEL(fill_tokens, (args)); }
void select_roles(const uint32_t* keys, int32_t n, int32_t inputs, int32_t targets, uint8_t* roles) {
    M4K_CALL_LEVEL(select_roles, (keys, n, inputs, targets, roles));
}
}  // namespace m4k::masking
#endif
