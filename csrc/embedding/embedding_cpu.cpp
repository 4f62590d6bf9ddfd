// CPU kernel of embedding's gradient, compiled once per SIMD level; the compiler vectorises the sums of rows.
#include <algorithm>
#include <cstring>

#include "embedding/embedding.h"

namespace m4k::M4K_SIMD_NS {
namespace {

// Below this many numbers a second thread costs more than it saves: about 5 us to wake it, 0.1 ns a number.
constexpr int64_t kMinNumbersPerThread = 1 << 16;

// Rows first … last: zeros, and the gradients of their tokens in the order of the tokens, whichever thread has them.
template <typename T>
void add_rows(const EmbeddingArgs<T>& a, int64_t first, int64_t last) {
    std::memset(a.out + first * a.dim, 0, static_cast<size_t>((last - first) * a.dim) * sizeof(T));
    for (int64_t t = 0; t < a.tokens; ++t) {
        const int64_t id = a.ids[t];
        if (id < first || id >= last) continue;
        const T* grad = a.grad + t * a.dim;
        T* __restrict out = a.out + id * a.dim;
        for (int64_t i = 0; i < a.dim; ++i) out[i] += grad[i];
    }
}

template <typename T>
void add_all(const EmbeddingArgs<T>& a) {
    const int64_t useful = std::max<int64_t>(1, a.rows * a.dim / kMinNumbersPerThread);
    const int64_t threads = std::min<int64_t>(a.threads, useful);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; ++t) add_rows(a, a.rows * t / threads, a.rows * (t + 1) / threads);
}

}  // namespace

void embedding_backward_f32(const EmbeddingArgs<float>& args) { add_all(args); }
void embedding_backward_f64(const EmbeddingArgs<double>& args) { add_all(args); }

}  // namespace m4k::M4K_SIMD_NS

#if defined(M4K_SIMD_PORTABLE)
namespace m4k {
namespace {

template <typename T>
bool in_range(const EmbeddingArgs<T>& a) {
    return std::all_of(a.ids, a.ids + a.tokens, [&](int64_t id) { return id >= 0 && id < a.rows; });
}

void run(const EmbeddingArgs<float>& args) { M4K_CALL_LEVEL(embedding_backward_f32, (args)); }
void run(const EmbeddingArgs<double>& args) { M4K_CALL_LEVEL(embedding_backward_f64, (args)); }

}  // namespace

bool embedding_backward(const EmbeddingArgs<float>& args) { return in_range(args) && (run(args), true); }
bool embedding_backward(const EmbeddingArgs<double>& args) { return in_range(args) && (run(args), true); }
}  // namespace m4k
#endif
