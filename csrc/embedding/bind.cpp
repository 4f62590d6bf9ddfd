// Python signatures of embedding's gradient; Python has checked shapes, dtypes and contiguity.
#include "common/bind.h"

#include "common/pointer.h"
#include "embedding/embedding.h"

namespace m4k {
namespace {

template <typename T>
bool backward(uintptr_t grad, uintptr_t ids, uintptr_t out, int64_t tokens, int64_t dim, int64_t rows, int threads) {
    return embedding_backward(EmbeddingArgs<T>{as_ptr<const T>(grad), as_ptr<const int64_t>(ids), as_ptr<T>(out),
                                               tokens, dim, rows, threads});
}

template <typename T>
void define(py::module_& m, const char* name) {
    def_by_name<&backward<T>, "grad", "ids", "out", "tokens", "dim", "rows", "threads">(m, name);
}

}  // namespace

void bind_embedding(py::module_& m) {
    define<float>(m, "embedding_backward_f32");
    define<double>(m, "embedding_backward_f64");
}

}  // namespace m4k
