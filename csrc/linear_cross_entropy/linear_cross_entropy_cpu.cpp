// The pass over a chunk of logits: log-sum-exp, the target's logit, whether the target is the first maximum, and in
// place the gradient. A row belongs to one thread and stays in its L2 cache, so the chunk is read and written once, and
// the result does not depend on the number of threads.
#include <cmath>
#include <cstring>
#include <limits>

#include "common/vec.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace m4k::M4K_SIMD_NS {
namespace {

// Below this many logits a second thread costs more than it saves.
constexpr int64_t kMinLogitsPerThread = 16384;
// Logits that a thread takes at a time.
constexpr int64_t kLogitsPerTurn = 65536;
// Sums are kept in blocks of this many elements, so that rounding errors grow with the number of blocks only.
constexpr int64_t kSumBlock = 2048;

// A row's end that does not fill a register, padded with -infinity.
struct Tail {
    float lanes[kLanes];
    Tail(const float* z, int64_t n) {
        for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? z[i] : -std::numeric_limits<float>::infinity();
    }
};

// The maximum, not looking at NaN; z has n elements.
float row_max(const float* z, int64_t n) {
    vfloat m0 = splat(-std::numeric_limits<float>::infinity()), m1 = m0, m2 = m0, m3 = m0;
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        m0 = vmax(load(z + i), m0);
        m1 = vmax(load(z + i + kLanes), m1);
        m2 = vmax(load(z + i + 2 * kLanes), m2);
        m3 = vmax(load(z + i + 3 * kLanes), m3);
    }
    for (; i + kLanes <= n; i += kLanes) m0 = vmax(load(z + i), m0);
    if (i < n) m1 = vmax(load(Tail(z + i, n - i).lanes), m1);
    return reduce_max(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// Σ exp(z - top); with kStore z becomes exp(z - top).
template <bool kStore>
float row_exp_sum(float* z, int64_t n, float top) {
    const vfloat shift = splat(top);
    vfloat total = splat(0.0f);
    int64_t i = 0;
    while (i + 2 * kLanes <= n) {
        const int64_t end = i + kSumBlock < n ? i + kSumBlock : n;
        vfloat s0 = splat(0.0f), s1 = s0;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
            const vfloat e0 = vexp(load(z + i) - shift), e1 = vexp(load(z + i + kLanes) - shift);
            if constexpr (kStore) {
                store(z + i, e0);
                store(z + i + kLanes, e1);
            }
            s0 = s0 + e0;
            s1 = s1 + e1;
        }
        total = total + (s0 + s1);
    }
    for (; i < n; i += kLanes) {
        const int64_t rest = n - i < kLanes ? n - i : kLanes;
        Tail tail(z + i, rest);
        const vfloat e = vexp(load(tail.lanes) - shift);
        store(tail.lanes, e);
        if constexpr (kStore) {
            for (int64_t j = 0; j < rest; ++j) z[i + j] = tail.lanes[j];
        }
        total = total + e;
    }
    return reduce_add(total);
}

void row_scale(float* z, int64_t n, float factor) {
    const vfloat f = splat(factor);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(z + i, load(z + i) * f);
    for (; i < n; ++i) z[i] *= factor;
}

float natural_log(float x) { return ::logf(x); }

// The same in float64, which only serves checks: plain loops.
double row_max(const double* z, int64_t n) {
    double top = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < n; ++i) top = z[i] > top ? z[i] : top;
    return top;
}

template <bool kStore>
double row_exp_sum(double* z, int64_t n, double top) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double e = ::exp(z[i] - top);
        if constexpr (kStore) z[i] = e;
        total += e;
    }
    return total;
}

void row_scale(double* z, int64_t n, double factor) {
    for (int64_t i = 0; i < n; ++i) z[i] *= factor;
}

double natural_log(double x) { return ::log(x); }

template <typename T>
bool contains(const T* z, int64_t n, T value) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= z[i] == value;
    return found;
}

template <typename T>
void row(const LogitsArgs<T>& a, int64_t i) {
    T* z = a.logits + i * a.width;
    const int64_t token = a.order[i], limit = a.limit[i], target = a.targets[token];
    const T top = row_max(z, limit);
    const T target_logit = z[target];
    const bool first_maximum = target_logit == top && !contains(z, target, top);
    const T total = a.gradient ? row_exp_sum<true>(z, limit, top) : row_exp_sum<false>(z, limit, top);
    a.nll[token] = natural_log(total) - (target_logit - top);
    a.correct[token] = first_maximum && total == total;
    if (!a.gradient) return;
    const T target_exp = z[target], scale = a.scale[i];
    row_scale(z, limit, scale / total);
    z[target] = (target_exp / total - T(1)) * scale;
    for (int64_t v = limit; v < a.width; ++v) z[v] = T(0);
}

template <typename T>
void all_rows(const LogitsArgs<T>& a) {
    const int64_t useful = a.rows * a.width / kMinLogitsPerThread;
    const int threads = useful < 2 ? 1 : (useful < a.threads ? static_cast<int>(useful) : a.threads);
    const int64_t turn = a.width < kLogitsPerTurn ? kLogitsPerTurn / a.width : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, turn) if (threads > 1)
    for (int64_t i = 0; i < a.rows; ++i) row(a, i);
}

}  // namespace

void cross_entropy_f32(const LogitsArgs<float>& args) { all_rows(args); }
void cross_entropy_f64(const LogitsArgs<double>& args) { all_rows(args); }

}  // namespace m4k::M4K_SIMD_NS

#if defined(M4K_SIMD_PORTABLE)
namespace m4k {
void cross_entropy(const LogitsArgs<float>& args) { M4K_CALL_LEVEL(cross_entropy_f32, (args)); }
void cross_entropy(const LogitsArgs<double>& args) { M4K_CALL_LEVEL(cross_entropy_f64, (args)); }
}  // namespace m4k
#endif
