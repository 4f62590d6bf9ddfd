// Python signatures of the CUDA kernels of mask_tokens, and of their block programs on the host.
#include <pybind11/stl.h>

#include "common/bind.h"
#include "common/pointer.h"
#include "mask_tokens/mask_tokens_block.h"

namespace m4k {
namespace {

using namespace masking;

BlockPlan make_block_plan(const std::vector<int32_t>& lens, const std::vector<int32_t>& input_rows, int64_t input_low,
                          int64_t input_high, const std::vector<int32_t>& target_rows, int64_t target_low,
                          int64_t target_high, uintptr_t gamma, uintptr_t exp2) {
    BlockPlan plan{};
    plan.modalities = static_cast<int32_t>(lens.size());
    int32_t offset = 0;
    for (size_t m = 0; m < lens.size(); ++m) {
        plan.lens[m] = lens[m];
        plan.offsets[m] = offset;
        plan.first_slot[m] = plan.slots;
        plan.rows[0][m] = static_cast<int16_t>(input_rows[m]);
        plan.rows[1][m] = static_cast<int16_t>(target_rows[m]);
        offset += lens[m];
        plan.slots += (lens[m] + kWarp - 1) / kWarp * kWarp;
    }
    plan.first_slot[lens.size()] = plan.slots;
    plan.low[0] = static_cast<int32_t>(input_low);
    plan.low[1] = static_cast<int32_t>(target_low);
    plan.high[0] = static_cast<int32_t>(input_high);
    plan.high[1] = static_cast<int32_t>(target_high);
    plan.gamma = as_ptr<const int32_t>(gamma);
    plan.exp2 = as_ptr<const int32_t>(exp2);
    return plan;
}

// The last two arguments say where to run: device and stream, or for the host the order of threads
// (a seed) and their number, 0 for as many as on the device.
template <auto Run>
void draw(const BlockPlan& plan, int64_t seed, uint32_t epoch, uintptr_t sample_ids, int64_t batch, uintptr_t lengths,
          uintptr_t input_counts, uintptr_t input_cu_seqlens, int64_t input_size, uintptr_t target_counts,
          uintptr_t target_cu_seqlens, int64_t target_size, uintptr_t totals, uintptr_t fits, int64_t where,
          uint64_t how) {
    Run(DrawArgs{plan,
                 {static_cast<uint64_t>(seed), epoch, as_ptr<const int64_t>(sample_ids)},
                 batch,
                 as_ptr<const int64_t>(lengths),
                 {as_ptr<int32_t>(input_counts), as_ptr<int32_t>(target_counts)},
                 {as_ptr<int32_t>(input_cu_seqlens), as_ptr<int32_t>(target_cu_seqlens)},
                 {input_size, target_size},
                 as_ptr<int32_t>(totals),
                 as_ptr<bool>(fits)},
        where, how);
}

template <auto Run>
void fill(const BlockPlan& plan, int64_t seed, uint32_t epoch, uintptr_t sample_ids, int64_t batch, uintptr_t lengths,
          uintptr_t fits, uintptr_t tokens, int token_type, int64_t tokens_stride, uintptr_t input_counts,
          uintptr_t input_cu_seqlens, uintptr_t input_ids, uintptr_t input_positions, uintptr_t input_modalities,
          int64_t input_size, int64_t input_fill, uintptr_t target_counts, uintptr_t target_cu_seqlens,
          uintptr_t target_ids, uintptr_t target_positions, uintptr_t target_modalities, int64_t target_size,
          int64_t target_fill, int64_t where, uint64_t how) {
    Run(FillArgs{plan,
                 {static_cast<uint64_t>(seed), epoch, as_ptr<const int64_t>(sample_ids)},
                 batch,
                 as_ptr<const int64_t>(lengths),
                 as_ptr<const bool>(fits),
                 as_ptr<const void>(tokens),
                 static_cast<TokenType>(token_type),
                 tokens_stride,
                 {{as_ptr<int32_t>(input_counts), as_ptr<int32_t>(input_cu_seqlens), as_ptr<int64_t>(input_ids),
                   as_ptr<int64_t>(input_positions), as_ptr<int64_t>(input_modalities), input_size, input_fill},
                  {as_ptr<int32_t>(target_counts), as_ptr<int32_t>(target_cu_seqlens), as_ptr<int64_t>(target_ids),
                   as_ptr<int64_t>(target_positions), as_ptr<int64_t>(target_modalities), target_size, target_fill}}},
        where, how);
}

constexpr auto draw_host = [](const DrawArgs& args, int64_t seed, uint64_t threads) {
    draw_on_host(args, static_cast<uint64_t>(seed), static_cast<int>(threads));
};
constexpr auto fill_host = [](const FillArgs& args, int64_t seed, uint64_t threads) {
    fill_on_host(args, static_cast<uint64_t>(seed), static_cast<int>(threads));
};
#if M4K_CUDA
constexpr auto draw_device = [](const DrawArgs& args, int64_t device, uint64_t stream) {
    draw_cuda(args, Target{static_cast<int>(device), static_cast<uintptr_t>(stream)});
};
constexpr auto fill_device = [](const FillArgs& args, int64_t device, uint64_t stream) {
    fill_cuda(args, Target{static_cast<int>(device), static_cast<uintptr_t>(stream)});
};
#endif

template <auto Run, Name Where, Name How>
void define_draw(py::module_& m, const char* name) {
    def_by_name<&draw<Run>, "plan", "seed", "epoch", "sample_ids", "batch", "lengths", "input_counts",
                "input_cu_seqlens", "input_size", "target_counts", "target_cu_seqlens", "target_size", "totals", "fits",
                Where, How>(m, name);
}

template <auto Run, Name Where, Name How>
void define_fill(py::module_& m, const char* name) {
    def_by_name<&fill<Run>, "plan", "seed", "epoch", "sample_ids", "batch", "lengths", "fits", "tokens", "token_type",
                "tokens_stride", "input_counts", "input_cu_seqlens", "input_ids", "input_positions", "input_modalities",
                "input_size", "input_fill", "target_counts", "target_cu_seqlens", "target_ids", "target_positions",
                "target_modalities", "target_size", "target_fill", Where, How>(m, name);
}

void ranks(uintptr_t keys, int n, uintptr_t out) {
    ranks_on_host(as_ptr<const uint32_t>(keys), n, as_ptr<int32_t>(out));
}

}  // namespace

void bind_mask_tokens_cuda(py::module_& m) {
    py::class_<BlockPlan>(m, "MaskBlockPlan")
        .def(py::init(&make_block_plan), py::kw_only(), "lens"_a, "input_rows"_a, "input_low"_a, "input_high"_a,
             "target_rows"_a, "target_low"_a, "target_high"_a, "gamma"_a, "exp2"_a);
    m.attr("mask_block_modalities") = kBlockModalities;
    m.attr("mask_block_seq_len") = kBlockSeqLen;
    m.attr("mask_block_slots") = kBlockSlots;
    m.attr("mask_block_warp") = kWarp;
    define_draw<draw_host, "order", "threads">(m, "mask_tokens_draw_host");
    define_fill<fill_host, "order", "threads">(m, "mask_tokens_fill_host");
    def_by_name<&ranks, "keys", "n", "ranks">(m, "mask_tokens_ranks_host");
#if M4K_CUDA
    define_draw<draw_device, "device", "stream">(m, "mask_tokens_draw_cuda");
    define_fill<fill_device, "device", "stream">(m, "mask_tokens_fill_cuda");
#endif
}

}  // namespace m4k
