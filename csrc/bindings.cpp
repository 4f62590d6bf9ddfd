#include "common/bind.h"

#define M4K_STRING(x) #x
#define M4K_EXPAND(x) M4K_STRING(x)

PYBIND11_MODULE(_C, m) {
    m.attr("version") = M4K_EXPAND(M4K_VERSION);
    m.attr("sources") = M4K_EXPAND(M4K_SOURCES);  // their digest, as m4kernels/_sources.py makes it
    m.attr("has_cuda") = bool(M4K_CUDA);
    m.attr("cuda_version") = M4K_EXPAND(M4K_CUDA_VERSION);  // of the toolkit: "13.0", or ""
    m.attr("cuda_archs") = M4K_EXPAND(M4K_CUDA_ARCHS);      // "80;90"; the last is there as PTX, too
#if defined(M4K_EMULATE_AVX512)
    m.attr("emulates_avx512") = true;
#else
    m.attr("emulates_avx512") = false;
#endif
    m4k::bind_simd(m);
    m4k::bind_adamw_step(m);
    m4k::bind_block(m);
    m4k::bind_embedding(m);
    m4k::bind_linear(m);
    m4k::bind_linear_cross_entropy(m);
    m4k::bind_segments(m);
    m4k::bind_cross_modal_attention(m);
    m4k::bind_mask_tokens(m);
    m4k::bind_mask_tokens_cuda(m);
    m4k::bind_quantize_coords(m);
    m4k::bind_quantize_coords_cuda(m);
}
