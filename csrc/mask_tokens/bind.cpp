// Python signatures of the mask_tokens kernels; Python has checked shapes, dtypes and contiguity.
#include "common/bind.h"

#include <pybind11/stl.h>

#include <tuple>

#include "common/philox.h"
#include "common/pointer.h"
#include "mask_tokens/mask_tokens.h"

namespace m4k {
namespace {

using masking::Args, masking::Draw, masking::Packed, masking::Plan, masking::Side, masking::TokenType;

Side make_side(const std::vector<int32_t>& rows, int64_t low, int64_t high) {
    Side side{rows, {}, low, high};
    for (size_t m = 0; m < rows.size(); ++m) {
        if (rows[m] != masking::kNever) side.playing.push_back(static_cast<int32_t>(m));
    }
    return side;
}

Plan make_plan(const std::vector<int32_t>& lens, const std::vector<int32_t>& input_rows, int64_t input_low,
               int64_t input_high, const std::vector<int32_t>& target_rows, int64_t target_low, int64_t target_high,
               uintptr_t gamma, uintptr_t exp2) {
    Plan plan{lens,
              {},
              make_side(input_rows, input_low, input_high),
              make_side(target_rows, target_low, target_high),
              as_ptr<const int32_t>(gamma),
              as_ptr<const int32_t>(exp2)};
    int64_t offset = 0;
    for (int32_t n : lens) {
        plan.offsets.push_back(offset);
        offset += n;
    }
    return plan;
}

Args make_args(const Plan& plan, int64_t seed, uint32_t epoch, uintptr_t sample_ids, int64_t batch, uintptr_t lengths,
               int threads) {
    Args args{};
    args.plan = &plan;
    args.draw = Draw{static_cast<uint64_t>(seed), epoch, as_ptr<const int64_t>(sample_ids)};
    args.batch = batch;
    args.lengths = as_ptr<const int64_t>(lengths);
    args.threads = threads;
    return args;
}

Packed make_packed(uintptr_t counts, uintptr_t cu_seqlens, uintptr_t ids, uintptr_t positions, uintptr_t modalities,
                   int64_t size, int64_t fill) {
    return {as_ptr<int32_t>(counts),
            as_ptr<int32_t>(cu_seqlens),
            as_ptr<int64_t>(ids),
            as_ptr<int64_t>(positions),
            as_ptr<int64_t>(modalities),
            size,
            fill};
}

// (input tokens, target tokens, index of the first length out of range or -1)
std::tuple<int64_t, int64_t, int64_t> count(const Plan& plan, int64_t seed, uint32_t epoch, uintptr_t sample_ids,
                                            int64_t batch, uintptr_t lengths, int threads, uintptr_t input_counts,
                                            uintptr_t input_cu_seqlens, uintptr_t target_counts,
                                            uintptr_t target_cu_seqlens) {
    Args args = make_args(plan, seed, epoch, sample_ids, batch, lengths, threads);
    args.inputs = make_packed(input_counts, input_cu_seqlens, 0, 0, 0, 0, 0);
    args.targets = make_packed(target_counts, target_cu_seqlens, 0, 0, 0, 0, 0);
    const masking::Totals totals = masking::count_tokens(args);
    return {totals.inputs, totals.targets, totals.bad_length};
}

void fill(const Plan& plan, int64_t seed, uint32_t epoch, uintptr_t sample_ids, int64_t batch, uintptr_t lengths,
          int threads, uintptr_t tokens, int token_type, int64_t tokens_stride, uintptr_t input_counts,
          uintptr_t input_cu_seqlens, uintptr_t input_ids, uintptr_t input_positions, uintptr_t input_modalities,
          int64_t input_size, int64_t input_fill, uintptr_t target_counts, uintptr_t target_cu_seqlens,
          uintptr_t target_ids, uintptr_t target_positions, uintptr_t target_modalities, int64_t target_size,
          int64_t target_fill) {
    Args args = make_args(plan, seed, epoch, sample_ids, batch, lengths, threads);
    args.tokens = as_ptr<const void>(tokens);
    args.token_type = static_cast<TokenType>(token_type);
    args.tokens_stride = tokens_stride;
    args.inputs = make_packed(input_counts, input_cu_seqlens, input_ids, input_positions, input_modalities, input_size,
                              input_fill);
    args.targets = make_packed(target_counts, target_cu_seqlens, target_ids, target_positions, target_modalities,
                               target_size, target_fill);
    masking::fill_tokens(args);
}

void select(uintptr_t keys, int32_t n, int32_t inputs, int32_t targets, uintptr_t roles) {
    masking::select_roles(as_ptr<const uint32_t>(keys), n, inputs, targets, as_ptr<uint8_t>(roles));
}

}  // namespace

void bind_mask_tokens(py::module_& m) {
    py::class_<Plan>(m, "MaskPlan")
        .def(py::init(&make_plan), py::kw_only(), "lens"_a, "input_rows"_a, "input_low"_a, "input_high"_a,
             "target_rows"_a, "target_low"_a, "target_high"_a, "gamma"_a, "exp2"_a);
    def_by_name<&count, "plan", "seed", "epoch", "sample_ids", "batch", "lengths", "threads", "input_counts",
                "input_cu_seqlens", "target_counts", "target_cu_seqlens">(m, "mask_tokens_count");
    def_by_name<&fill, "plan", "seed", "epoch", "sample_ids", "batch", "lengths", "threads", "tokens", "token_type",
                "tokens_stride", "input_counts", "input_cu_seqlens", "input_ids", "input_positions", "input_modalities",
                "input_size", "input_fill", "target_counts", "target_cu_seqlens", "target_ids", "target_positions",
                "target_modalities", "target_size", "target_fill">(m, "mask_tokens_fill");
    def_by_name<&select, "keys", "n", "inputs", "targets", "roles">(m, "mask_tokens_select");
    m.def("philox4x32_10", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        PhiloxBlock block{{counter[0], counter[1], counter[2], counter[3]}};
        philox4x32_10(block, key[0], key[1]);
        return std::array<uint32_t, 4>{block.x[0], block.x[1], block.x[2], block.x[3]};
    });
}

}  // namespace m4k
