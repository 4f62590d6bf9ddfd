// Forward pass: one task is one (sample, key-value head), worked through in sequence, so that the result does not
// depend on the number of threads. Whole rows of scores are held, so the softmax needs no rescaling.
#include <math.h>

#include "cross_modal_attention/tasks.h"
#include "cross_modal_attention/tiles.h"

namespace m4k::M4K_SIMD_NS {
namespace {

// Exponentials of `rows` rows of scores in place, minus the row's largest; 1 / their sum; and the logsumexp.
void softmax_rows(int rows, float* scores, int64_t row_step, const Span* spans, int span_count, float* inverse,
                  float* lse) {
    const vfloat lowest = splat(-INFINITY), zero = splat(0.0f);
    for (int i = 0; i < rows; ++i) {
        float* row = scores + i * row_step;
        vfloat top = lowest;
        for (int s = 0; s < span_count; ++s) {
            const float* x = row + spans[s].column;
            int j = 0;
            for (; j + kLanes <= spans[s].length; j += kLanes) top = vmax(top, load(x + j));
            if (j < spans[s].length) top = vmax(top, first_lanes(load(x + j), spans[s].length - j, lowest));
        }
        const float largest = reduce_max(top);
        const vfloat shift = splat(largest);
        vfloat sum = zero;
        for (int s = 0; s < span_count; ++s) {
            float* x = row + spans[s].column;
            int j = 0;
            for (; j + kLanes <= spans[s].length; j += kLanes) {
                const vfloat e = vexp(load(x + j) - shift);
                store(x + j, e);
                sum = sum + e;
            }
            if (j < spans[s].length) {
                const vfloat e = first_lanes(vexp(load(x + j) - shift), spans[s].length - j, zero);
                store(x + j, e);
                sum = sum + e;
            }
        }
        const float total = reduce_add(sum);
        inverse[i] = 1.0f / total;
        lse[i] = largest + logf(total);
    }
}

template <typename T>
struct ForwardTask {
    const AttentionPlan& plan;
    const ForwardArgs<T>& args;
    const int dim;
    const int64_t padded;
    Span* spans;
    float *k_panels, *v_buffer, *scratch, *q_buffer, *scores, *tile;
    int64_t scores_row;

    ForwardTask(const AttentionPlan& p, const ForwardArgs<T>& a, const AttentionWorkspace& size, float* workspace)
        : plan(p), args(a), dim(a.shape.head_dim), padded(round_up(dim, kLanes)), scores_row(size.columns) {
        Arena arena{workspace};
        k_panels = arena.take(size.columns * size.dim);
        v_buffer = arena.take(p.longest_k * size.dim);
        scratch = arena.take(kMaxLanes * size.dim);
        q_buffer = arena.take(kMaxRows * size.dim);
        scores = arena.take(kMaxRows * size.columns);
        tile = arena.take(kMaxRows * size.dim);
        spans = reinterpret_cast<Span*>(arena.take(int64_t{p.k_groups} * (sizeof(Span) / sizeof(float))));
    }

    void run(int64_t sample, int kv_head) const {
        const AttentionShape& shape = args.shape;
        const int32_t* q_bounds = plan.q_bounds + sample * (plan.q_groups + 1);
        const int32_t* k_bounds = plan.k_bounds + sample * (plan.k_groups + 1);
        if (q_bounds[0] == q_bounds[plan.q_groups]) return;
        const int span_count = list_spans(plan, sample, -1, spans);
        for (int s = 0; s < span_count; ++s) {
            pack_panels(args.k, k_bounds[0], kv_head, dim, spans[s], k_panels, scratch);
        }
        const int group_heads = shape.q_heads / shape.kv_heads;
        const int64_t keys = k_bounds[plan.k_groups] - k_bounds[0];
        const int64_t queries = q_bounds[plan.q_groups] - q_bounds[0];
        const Rows values = whole_rows(args.v, k_bounds[0], keys, kv_head, dim, v_buffer);
        for (int g = 0; g < plan.q_groups; ++g) {
            const int attended = list_spans(plan, sample, g, spans);
            for (int head = kv_head * group_heads; head < (kv_head + 1) * group_heads; ++head) {
                const Blocks blocks(q_bounds[g + 1] - q_bounds[g]);
                int64_t token = q_bounds[g];
                for (int i = 0; i < blocks.count; ++i) {
                    const int count = blocks.rows(i);
                    prefetch_rows<true>(args.out, token, count, head, dim);
                    if (head + 1 < shape.q_heads) prefetch_rows<false>(args.q, token, count, head + 1, dim);
                    if (head == kv_head * group_heads && kv_head + 1 < shape.kv_heads) {
                        const int64_t done = token - q_bounds[0];
                        const int64_t begin = keys * done / queries, end = keys * (done + count) / queries;
                        prefetch_rows<false>(args.k, k_bounds[0] + begin, end - begin, kv_head + 1, dim);
                        prefetch_rows<false>(args.v, k_bounds[0] + begin, end - begin, kv_head + 1, dim);
                    }
                    rows(token, count, head, attended, values);
                    token += count;
                }
            }
        }
    }

    // A register block's rows, from queries to outputs.
    void rows(int64_t token, int count, int head, int span_count, const Rows& values) const {
        float* lse = args.lse + head * args.shape.q_tokens + token;
        if (span_count == 0) {
            for (int i = 0; i < count; ++i) {
                std::memset(at(args.out, token + i, head), 0, sizeof(T) * dim);
                lse[i] = -INFINITY;
            }
            return;
        }
        const Rows queries = operand_rows(token, count, head);
        for (int s = 0; s < span_count; ++s) {
            span_scores(count, queries.data, queries.step, dim, spans[s], k_panels, scores, scores_row,
                        &args.shape.scale);
        }
        float inverse[kMaxRows];
        softmax_rows(count, scores, scores_row, spans, span_count, inverse, lse);

        float* out = tile;
        int64_t out_row = padded;
        if constexpr (std::is_same_v<T, float>) {
            if (is_direct<T>(dim)) out = at(args.out, token, head), out_row = args.out.token;
        }
        for (int s = 0; s < span_count; ++s) {
            const Span& span = spans[s];
            const Product product{
                scores + span.column, scores_row, 1, values.data + span.key * values.step, values.step, out, out_row,
                span.length,          inverse,    1};
            const int vectors = static_cast<int>(padded / kLanes);
            s == 0 ? rows_product<false>(count, vectors, product) : rows_product<true>(count, vectors, product);
        }
        if (out == tile) {
            for (int i = 0; i < count; ++i) store_row(tile + i * padded, dim, at(args.out, token + i, head));
        }
    }

    Rows operand_rows(int64_t token, int count, int head) const {
        if constexpr (std::is_same_v<T, float>) return {at(args.q, token, head), args.q.token};
        return whole_rows(args.q, token, count, head, dim, q_buffer);
    }
};

}  // namespace

void attention_forward(const AttentionPlan& plan, const ForwardArgs<float>& args) {
    run_tasks<ForwardTask<float>>(plan, args);
}
void attention_forward(const AttentionPlan& plan, const ForwardArgs<uint16_t>& args) {
    run_tasks<ForwardTask<uint16_t>>(plan, args);
}

}  // namespace m4k::M4K_SIMD_NS
