// Counter-based random numbers, specified to the bit: the same recipe as dqe_engine/zones/philox.py.
//
// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Only integer operations and
// correctly rounded f64 +, -, *, /: compile without contraction (-ffp-contract=off, nvcc --fmad=false), or a fused
// multiply-add changes the last bit of log() and with it, rarely, a pick.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DQE_HOST_DEVICE __host__ __device__
#else
#define DQE_HOST_DEVICE
#endif

namespace dqe {

struct Words {
    uint32_t x[4];
};

// Ten rounds on one 128-bit counter block.
DQE_HOST_DEVICE inline Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * counter.x[0];
        const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.x[2];
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.x[1] ^ key0, static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.x[3] ^ key1, static_cast<uint32_t>(product0)}};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

// u(seed, b, i) in (0, 1): an odd multiple of 2^-53, so exact, never 0 and never 1.
DQE_HOST_DEVICE inline double uniform(uint64_t seed, uint64_t query, uint64_t item) {
    const Words counter = {
        {static_cast<uint32_t>(item), static_cast<uint32_t>(item >> 32), static_cast<uint32_t>(query), static_cast<uint32_t>(query >> 32)}};
    const Words out = philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const uint64_t bits = (uint64_t{out.x[1]} << 32 | out.x[0]) >> 12;
    return static_cast<double>(2 * bits + 1) * 0x1p-53;
}

// Natural logarithm of positive, normal, finite x: fdlibm's e_log.c without its special cases.
DQE_HOST_DEVICE inline double log(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int exponent = static_cast<int>(bits >> 52) - 1022;
    bits = (bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000;  // mantissa in [1/2, 1)
    double mantissa;
    std::memcpy(&mantissa, &bits, sizeof mantissa);
    if (mantissa < 0.70710678118654752440) {
        mantissa *= 2.0;
        --exponent;
    }
    const double f = mantissa - 1.0;  // in [sqrt(1/2) - 1, sqrt(2) - 1)
    const double e = exponent;
    const double s = f / (2.0 + f);
    const double z = s * s;
    double r = z * 1.479819860511658591e-01;
    r = z * (1.531383769920937332e-01 + r);
    r = z * (1.818357216161805012e-01 + r);
    r = z * (2.222219843214978396e-01 + r);
    r = z * (2.857142874366239149e-01 + r);
    r = z * (3.999999999940941908e-01 + r);
    r = z * (6.666666666666735130e-01 + r);
    const double half_square = 0.5 * f * f;
    return e * 6.93147180369123816490e-01 - ((half_square - (s * (half_square + r) + e * 1.90821492927058770002e-10)) - f);
}

// Standard Gumbel variate of a uniform one.
DQE_HOST_DEVICE inline double gumbel(double u) { return -log(-log(u)); }

}  // namespace dqe
