// The kernel of fused.h with products of bfloat16: the processor's at the level avx512bf16, else made of float
// products.
#include "linear_cross_entropy/fused_chunk.h"

namespace m4k::M4K_SIMD_NS {

void fused_chunk_bf16(const FusedChunk& chunk) { Chunk<Bf16Pairs>(chunk).run(); }

}  // namespace m4k::M4K_SIMD_NS
