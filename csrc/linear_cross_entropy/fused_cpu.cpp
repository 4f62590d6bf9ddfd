// The kernel of fused.h with products of floats.
#include "linear_cross_entropy/fused_chunk.h"

namespace m4k::M4K_SIMD_NS {

void fused_chunk(const FusedChunk& chunk) { Chunk<Floats>(chunk).run(); }

}  // namespace m4k::M4K_SIMD_NS
