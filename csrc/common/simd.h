// SIMD levels. Each *_cpu.cpp is compiled once per level (see setup.py); the level is chosen at run time. avx512bf16 is
// avx512 with dot products of bfloat16: only *_bf16_cpu.cpp is compiled for it, everything else runs as avx512.
#pragma once

#if defined(M4K_SIMD_AVX512BF16)
#define M4K_SIMD_NS avx512bf16
#elif defined(M4K_SIMD_AVX512)
#define M4K_SIMD_NS avx512
#elif defined(M4K_SIMD_AVX2)
#define M4K_SIMD_NS avx2
#else
#define M4K_SIMD_NS portable
#endif

namespace m4k {

enum class SimdLevel : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// The level in use: the best that this CPU has, or what set_simd_level asked for.
SimdLevel simd_level();
const char* simd_level_name();
// "portable", "avx2", "avx512", "avx512bf16" or "auto". Throws std::invalid_argument for a level that is unknown or
// that the CPU lacks.
void set_simd_level(const char* name);

}  // namespace m4k

// Declares one function per compiled level: M4K_DECLARE_LEVELS(void, add, (const AddArgs& args)).
#if M4K_X86
#define M4K_DECLARE_LEVELS(ret, name, params) \
    namespace portable {                      \
    ret name params;                          \
    }                                         \
    namespace avx2 {                          \
    ret name params;                          \
    }                                         \
    namespace avx512 {                        \
    ret name params;                          \
    }
// Calls the function of the level in use: M4K_CALL_LEVEL(add, (args)).
#define M4K_CALL_LEVEL(name, arguments)    \
    switch (::m4k::simd_level()) {         \
        case ::m4k::SimdLevel::avx512bf16: \
        case ::m4k::SimdLevel::avx512:     \
            return avx512::name arguments; \
        case ::m4k::SimdLevel::avx2:       \
            return avx2::name arguments;   \
        case ::m4k::SimdLevel::portable:   \
            break;                         \
    }                                      \
    return portable::name arguments
// The same for functions of *_bf16_cpu.cpp, which every level has.
#define M4K_DECLARE_BF16_LEVELS(ret, name, params) \
    M4K_DECLARE_LEVELS(ret, name, params)          \
    namespace avx512bf16 {                         \
    ret name params;                               \
    }
#define M4K_CALL_BF16_LEVEL(name, arguments)                   \
    if (::m4k::simd_level() == ::m4k::SimdLevel::avx512bf16) { \
        return avx512bf16::name arguments;                     \
    }                                                          \
    M4K_CALL_LEVEL(name, arguments)
#else
#define M4K_DECLARE_LEVELS(ret, name, params) \
    namespace portable {                      \
    ret name params;                          \
    }
#define M4K_CALL_LEVEL(name, arguments) return portable::name arguments
#define M4K_DECLARE_BF16_LEVELS M4K_DECLARE_LEVELS
#define M4K_CALL_BF16_LEVEL M4K_CALL_LEVEL
#endif
