#include "common/simd.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace m4k {
namespace {

SimdLevel best_level() {
#if M4K_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
#if defined(M4K_EMULATE_AVX512)
    if (avx2) return SimdLevel::avx512bf16;
#endif
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return SimdLevel::avx512bf16;
    if (avx512) return SimdLevel::avx512;
    if (avx2) return SimdLevel::avx2;
#endif
    return SimdLevel::portable;
}

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

SimdLevel& current() {
    static SimdLevel level = best_level();
    return level;
}

}  // namespace

SimdLevel simd_level() { return current(); }

const char* simd_level_name() { return kNames[static_cast<int>(current())]; }

void set_simd_level(const char* name) {
    const SimdLevel best = best_level();
    if (std::strcmp(name, "auto") == 0) {
        current() = best;
        return;
    }
    for (int i = 0; i < 4; ++i) {
        if (std::strcmp(name, kNames[i]) != 0) continue;
        if (i > static_cast<int>(best)) {
            throw std::invalid_argument(std::string("SIMD level '") + name + "' is not available: the best here is '" +
                                        kNames[static_cast<int>(best)] + "'");
        }
        current() = static_cast<SimdLevel>(i);
        return;
    }
    throw std::invalid_argument(std::string("SIMD level '") + name +
                                "' is unknown: expected auto, portable, avx2, avx512 or avx512bf16");
}

}  // namespace m4k
