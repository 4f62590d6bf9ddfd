#include "common/fma.h"

namespace m4k {

int64_t fma_loop(int64_t steps) { M4K_CALL_LEVEL(fma_loop, (steps)); }

}  // namespace m4k
