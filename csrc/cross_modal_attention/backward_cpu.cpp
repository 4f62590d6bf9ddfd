// Backward pass: one task is one (sample, key-value head) with all its query heads, worked through in sequence, so that
// nothing is shared between threads and the result does not depend on their number. With P = exp(S - lse):
// dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP - Σ P dP), dQ = scale dS K, dK = scale dSᵀ Q.
#include "cross_modal_attention/tasks.h"
#include "cross_modal_attention/tiles.h"

namespace m4k::M4K_SIMD_NS {
namespace {

// In place: scores → P, grads (dP) → dS. The row's Σ P dP is exact to its own rounding, so `out` is not needed.
void score_gradients(int rows, float* scores, float* grads, int64_t row_step, const Span* spans, int span_count,
                     const float* lse) {
    const vfloat zero = splat(0.0f);
    for (int i = 0; i < rows; ++i) {
        float* p_row = scores + i * row_step;
        float* g_row = grads + i * row_step;
        const vfloat shift = splat(lse[i]);
        vfloat sum = zero;
        for (int s = 0; s < span_count; ++s) {
            float* p = p_row + spans[s].column;
            const float* g = g_row + spans[s].column;
            int j = 0;
            for (; j + kLanes <= spans[s].length; j += kLanes) {
                const vfloat e = vexp(load(p + j) - shift);
                store(p + j, e);
                sum = fma(e, load(g + j), sum);
            }
            if (j < spans[s].length) {
                const vfloat e = vexp(load(p + j) - shift);
                store(p + j, e);
                sum = sum + first_lanes(e * load(g + j), spans[s].length - j, zero);
            }
        }
        const vfloat delta = splat(reduce_add(sum));
        for (int s = 0; s < span_count; ++s) {
            const float* p = p_row + spans[s].column;
            float* g = g_row + spans[s].column;
            for (int j = 0; j < spans[s].length; j += kLanes) store(g + j, load(p + j) * (load(g + j) - delta));
        }
    }
}

// The gradient of keys or values of one head: rows of whole registers, in the tensor itself or in a buffer.
struct GradRows {
    float* data;
    int64_t step;
};

template <typename T>
struct BackwardTask {
    const AttentionPlan& plan;
    const BackwardArgs<T>& args;
    const int dim;
    const int64_t padded;
    const int vectors;
    const float one = 1.0f;
    Span* spans;
    int32_t* touched;  // (k_groups): whether the gradients of a group have been written
    float *k_panels, *v_panels, *scratch, *k_buffer, *q_buffer, *grad_buffer, *scores, *grads, *tile, *k_grad, *v_grad;
    int64_t scores_row;

    BackwardTask(const AttentionPlan& p, const BackwardArgs<T>& a, const AttentionWorkspace& size, float* workspace)
        : plan(p),
          args(a),
          dim(a.shape.head_dim),
          padded(round_up(dim, kLanes)),
          vectors(static_cast<int>(padded / kLanes)),
          scores_row(size.columns) {
        Arena arena{workspace};
        k_panels = arena.take(size.columns * size.dim);
        v_panels = arena.take(size.columns * size.dim);
        scratch = arena.take(kMaxLanes * size.dim);
        k_buffer = arena.take(p.longest_k * size.dim);
        q_buffer = arena.take(kBackwardRows * size.dim);
        grad_buffer = arena.take(kBackwardRows * size.dim);
        scores = arena.take(kBackwardRows * size.columns);
        grads = arena.take(kBackwardRows * size.columns);
        tile = arena.take(kMaxRows * size.dim);
        k_grad = arena.take(p.longest_k * size.dim);
        v_grad = arena.take(p.longest_k * size.dim);
        spans = reinterpret_cast<Span*>(arena.take(int64_t{p.k_groups} * (sizeof(Span) / sizeof(float))));
        touched = reinterpret_cast<int32_t*>(arena.take(p.k_groups));
    }

    void run(int64_t sample, int kv_head) const {
        const AttentionShape& shape = args.shape;
        const int32_t* q_bounds = plan.q_bounds + sample * (plan.q_groups + 1);
        const int32_t* k_bounds = plan.k_bounds + sample * (plan.k_groups + 1);
        const int64_t first_key = k_bounds[0], keys = k_bounds[plan.k_groups] - first_key;
        std::memset(touched, 0, sizeof(int32_t) * plan.k_groups);

        int span_count = list_spans(plan, sample, -1, spans);
        if (q_bounds[0] < q_bounds[plan.q_groups]) {
            for (int s = 0; s < span_count; ++s) {
                pack_panels(args.k, first_key, kv_head, dim, spans[s], k_panels, scratch);
                pack_panels(args.v, first_key, kv_head, dim, spans[s], v_panels, scratch);
            }
        }
        prefetch_rows<true>(args.grad_k, first_key, keys, kv_head, dim);
        prefetch_rows<true>(args.grad_v, first_key, keys, kv_head, dim);
        if (kv_head + 1 < shape.kv_heads) {
            prefetch_rows<false>(args.k, first_key, keys, kv_head + 1, dim);
            prefetch_rows<false>(args.v, first_key, keys, kv_head + 1, dim);
        }
        const Rows key_rows = whole_rows(args.k, first_key, keys, kv_head, dim, k_buffer);
        const GradRows grad_k = grad_rows(args.grad_k, first_key, kv_head, k_grad);
        const GradRows grad_v = grad_rows(args.grad_v, first_key, kv_head, v_grad);

        const int group_heads = shape.q_heads / shape.kv_heads;
        for (int g = 0; g < plan.q_groups; ++g) {
            const int attended = list_spans(plan, sample, g, spans);
            const int count = q_bounds[g + 1] - q_bounds[g];
            const int parts = (count + kBackwardRows - 1) / kBackwardRows;
            for (int head = kv_head * group_heads; head < (kv_head + 1) * group_heads; ++head) {
                for (int i = 0; i < parts; ++i) {
                    const int begin = static_cast<int>(int64_t{count} * i / parts);
                    const int end = static_cast<int>(int64_t{count} * (i + 1) / parts);
                    part(q_bounds[g] + begin, end - begin, head, attended, key_rows, grad_k, grad_v);
                }
            }
        }
        span_count = list_spans(plan, sample, -1, spans);
        for (int s = 0; s < span_count; ++s) {
            const int64_t first = first_key + spans[s].key;
            write_back(args.grad_k, first, kv_head, spans[s], grad_k);
            write_back(args.grad_v, first, kv_head, spans[s], grad_v);
        }
    }

    // What these rows will write, and their share of what the next head will read.
    void prefetch(int64_t token, int rows, int head) const {
        const AttentionShape& shape = args.shape;
        prefetch_rows<true>(args.grad_q, token, rows, head, dim);
        if (head + 1 == shape.q_heads) return;
        prefetch_rows<false>(args.q, token, rows, head + 1, dim);
        prefetch_rows<false>(args.grad_out, token, rows, head + 1, dim);
    }

    // At most kBackwardRows query rows of one head: writes their dQ, adds to dK and dV.
    void part(int64_t token, int count, int head, int span_count, const Rows& key_rows, const GradRows& grad_k,
              const GradRows& grad_v) const {
        if (span_count == 0) {
            for (int i = 0; i < count; ++i) std::memset(at(args.grad_q, token + i, head), 0, sizeof(T) * dim);
            return;
        }
        const Rows queries = whole_rows(args.q, token, count, head, dim, q_buffer);
        const Rows out_grads = whole_rows(args.grad_out, token, count, head, dim, grad_buffer);
        const float* lse = args.lse + head * args.shape.q_tokens + token;
        const Blocks blocks(count);
        for (int i = 0, row = 0; i < blocks.count; row += blocks.rows(i), ++i) {
            const int rows = blocks.rows(i);
            prefetch(token + row, rows, head);
            float* p = scores + row * scores_row;
            float* ds = grads + row * scores_row;
            for (int s = 0; s < span_count; ++s) {
                span_scores(rows, queries.data + row * queries.step, queries.step, dim, spans[s], k_panels, p,
                            scores_row, &args.shape.scale);
                span_scores(rows, out_grads.data + row * out_grads.step, out_grads.step, dim, spans[s], v_panels, ds,
                            scores_row, &one);
            }
            score_gradients(rows, p, ds, scores_row, spans, span_count, lse + row);
            query_gradient(token + row, rows, head, span_count, ds, key_rows);
        }
        for (int s = 0; s < span_count; ++s) {
            const Span& span = spans[s];
            key_gradient(span, scores, count, out_grads, grad_v, &one);
            key_gradient(span, grads, count, queries, grad_k, &args.shape.scale);
            touched[span.group] = 1;
        }
    }

    void query_gradient(int64_t token, int rows, int head, int span_count, const float* ds,
                        const Rows& key_rows) const {
        float* out = tile;
        int64_t out_row = padded;
        if constexpr (std::is_same_v<T, float>) {
            if (is_direct<T>(dim)) out = at(args.grad_q, token, head), out_row = args.grad_q.token;
        }
        for (int s = 0; s < span_count; ++s) {
            const Product product{
                ds + spans[s].column, scores_row, 1,       key_rows.data + spans[s].key * key_rows.step,
                key_rows.step,        out,        out_row, spans[s].length,
                &args.shape.scale,    0};
            s == 0 ? rows_product<false>(rows, vectors, product) : rows_product<true>(rows, vectors, product);
        }
        if (out == tile) {
            for (int i = 0; i < rows; ++i) store_row(tile + i * padded, dim, at(args.grad_q, token + i, head));
        }
    }

    // result[key, :] (+)= scale * sum over rows of weights[row, key] * other[row, :], for the span's keys.
    void key_gradient(const Span& span, const float* weights, int count, const Rows& other, const GradRows& result,
                      const float* scale) const {
        const Blocks blocks(span.length);
        for (int i = 0, key = 0; i < blocks.count; key += blocks.rows(i), ++i) {
            const Product product{weights + span.column + key,
                                  1,
                                  scores_row,
                                  other.data,
                                  other.step,
                                  result.data + (span.key + key) * result.step,
                                  result.step,
                                  count,
                                  scale,
                                  0};
            touched[span.group] ? rows_product<true>(blocks.rows(i), vectors, product)
                                : rows_product<false>(blocks.rows(i), vectors, product);
        }
    }

    GradRows grad_rows(const Heads<T>& tensor, int64_t first, int kv_head, float* buffer) const {
        if constexpr (std::is_same_v<T, float>) {
            if (is_direct<T>(dim)) return {at(tensor, first, kv_head), tensor.token};
        }
        return {buffer, padded};
    }

    // Writes zeros where no query attended, and copies from the buffer.
    void write_back(const Heads<T>& tensor, int64_t first, int kv_head, const Span& span, const GradRows& rows) const {
        for (int j = 0; j < span.length; ++j) {
            T* to = at(tensor, first + j, kv_head);
            if (!touched[span.group]) {
                std::memset(to, 0, sizeof(T) * dim);
            } else if (!is_direct<T>(dim)) {
                store_row(rows.data + (span.key + j) * rows.step, dim, to);
            }
        }
    }
};

}  // namespace

void attention_backward(const AttentionPlan& plan, const BackwardArgs<float>& args) {
    run_tasks<BackwardTask<float>>(plan, args);
}
void attention_backward(const AttentionPlan& plan, const BackwardArgs<uint16_t>& args) {
    run_tasks<BackwardTask<uint16_t>>(plan, args);
}

}  // namespace m4k::M4K_SIMD_NS
