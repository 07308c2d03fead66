// Quantised copies of vectors that give certified upper bounds of their scores, at a quarter of the memory traffic.
//
// A vector c is held as codes in -127..127 and a scale: ĉ = scale * codes. For a quantised query q̂,
//     <q, c> = <q̂, ĉ> + <q - q̂, ĉ> + <q, c - ĉ> <= <q̂, ĉ> + |q - q̂| |ĉ| + |q| |c - ĉ|          (Cauchy-Schwarz),
// and <q̂, ĉ> is an exact integer times two scales. What is compared with a threshold is not <q, c> but its float32
// rounding, in whatever order it was added up, and the bound is itself computed in float32: both errors are below
// (D + 32) * 2^-24 * |q| (|c| + |ĉ|), which the stored error norms contain. An item whose bound is below the threshold
// therefore cannot reach it. A vector with numbers that are not finite, or with a norm beyond 2^60 where sums could overflow,
// gets a NaN bound, which excludes nothing.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "tiles.hpp"

namespace dqe::cpu {

// Wider rows could overflow the 32-bit sums of products of codes.
constexpr int64_t kMostCodedWidth = 65536;

constexpr float kMostCode = 127.0f;

// What the positive codes of a query that enter one sum of 16 bits may add up to, and the negative ones: times 255, it still fits.
constexpr int32_t kMostSum = 128;

// A product of two of these is a normal number, far above what underflow can take from a score.
constexpr double kLeastNorm = 1e-18;

// A norm rounded up, with room for the rounding of the sums of squares that it comes from (relative 2^-40 at most).
inline float at_least(double value) {
    const auto rounded = static_cast<float>(value * (1.0 + 0x1p-30));
    // std::nextafter, which is a call, towards infinity: of what is neither negative nor infinite or NaN.
    return rounded < std::numeric_limits<float>::infinity() ? std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) + 1) : rounded;
}

// Entries of a coded row of vectors of `width` numbers: a multiple of kCodeAlignment, the rest coded as zero.
inline int64_t code_width(int64_t width) { return (width + kCodeAlignment - 1) / kCodeAlignment * kCodeAlignment; }

// Encode `count` rows of `width` numbers: codes + 128 into (count, code_width) and three numbers a row.
void encode_rows(const float* rows, int64_t count, int64_t width, uint8_t* codes, float* scales, float* errors, float* norms) noexcept;

// One query: signed codes (code_width,), and what CodedQueries holds of it. `short_sums`: codes that kernels may add up in 16 bits
// (kMostSum); they are coarser, 2.6 times for Gaussian vectors, and so is the bound.
void encode_query(const float* query, int64_t width, bool short_sums, int8_t* codes, int32_t& offset, float& scale, float& norm,
                  float& error) noexcept;

}  // namespace dqe::cpu
