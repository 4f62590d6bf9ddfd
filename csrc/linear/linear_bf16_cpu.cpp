// The kernel of linear.h with products of bfloat16: the processor's at the level avx512bf16, else made of float
// products.
#include "linear/product.h"

namespace m4k::M4K_SIMD_NS {

void linear_product_bf16(const LinearArgs& args, const LinearLayout& layout) {
    LinearProduct<Bf16Pairs>(args, layout).run();
}

}  // namespace m4k::M4K_SIMD_NS
