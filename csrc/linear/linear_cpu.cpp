// The kernel of linear.h with products of floats.
#include "linear/product.h"

namespace m4k::M4K_SIMD_NS {

void linear_product(const LinearArgs& args, const LinearLayout& layout) { LinearProduct<Floats>(args, layout).run(); }

}  // namespace m4k::M4K_SIMD_NS
