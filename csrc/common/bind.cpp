#include "common/bind.h"

#include <pybind11/stl.h>

#include "common/block_host.h"
#include "common/fma.h"
#include "common/pointer.h"
#include "common/segments.h"
#include "common/simd.h"

namespace m4k {

void bind_simd(py::module_& m) {
    m.def("simd_level", &simd_level_name);
    m.def("set_simd_level", &set_simd_level);
    m.def("fma_loop", &fma_loop, "steps"_a, release_gil);
}

void bind_block(py::module_& m) {
    m.def("host_block_order", &host_block_order);
#if M4K_CUDA
    m.def("cuda_driver_version", &cuda_driver_version);
#endif
}

namespace {

bool consistent(uintptr_t cu_seqlens, uintptr_t counts, int64_t batch, int64_t modalities, int64_t total,
                int64_t max_seqlen) {
    const SegmentsView segments{as_ptr<const int32_t>(cu_seqlens), as_ptr<const int32_t>(counts)};
    return segments_consistent(segments, batch, modalities, total, max_seqlen);
}

}  // namespace

void bind_segments(py::module_& m) {
    def_by_name<&consistent, "cu_seqlens", "counts", "batch", "modalities", "total", "max_seqlen">(
        m, "segments_consistent");
}

}  // namespace m4k
