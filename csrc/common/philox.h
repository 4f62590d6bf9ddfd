// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw (SC 2011), for host and device.
#pragma once

#include <cstdint>

#include "common/hostdevice.h"

namespace m4k {

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
    uint32_t x[4];
};

// One block of four words in place: on entry the counter.
M4K_HD void philox4x32_10(PhiloxBlock& block, uint32_t k0, uint32_t k1) {
    uint32_t* x = block.x;
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t{kPhiloxM0} * x[0], p1 = uint64_t{kPhiloxM1} * x[2];
        const uint32_t y0 = static_cast<uint32_t>(p1 >> 32) ^ x[1] ^ k0;
        const uint32_t y2 = static_cast<uint32_t>(p0 >> 32) ^ x[3] ^ k1;
        x[0] = y0;
        x[1] = static_cast<uint32_t>(p1);
        x[2] = y2;
        x[3] = static_cast<uint32_t>(p0);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
}

}  // namespace m4k
