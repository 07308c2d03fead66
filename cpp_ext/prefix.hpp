// The screen's first level: the first P numbers of each row in a rotated basis, quantised, and how long the rest of the row is. Where few
// directions hold most of what rows are made of, this rules out nearly all of them at a fraction of the bytes of their codes.
//
// Let A be the (P, D) axes and E the rows nearest to them that are exactly orthonormal: |A - E| <= |A Aᵀ - I| <= kSkew. A row c splits into
// Ec and a rest c2 orthogonal to E's rows, |c2|² = |c|² - |Ec|², and a query q likewise, so that
//     <q, c> = <Eq, Ec> + <q2, c2> <= <q̂, ĉ> + |Eq - q̂| |ĉ| + |Eq| |Ec - ĉ| + |q2| |c2|                     (Cauchy-Schwarz),
// with codes ĉ of what was computed for Ec, and q̂ of what was computed for Eq. The rotation's own error is part of what is stored: c' was
// added up in float32 from A, so that |c' - Ec| <= ω |c| with ω = kSkew + sqrt(P) (D + 2) 2^-24, and q' in double, with ω = 2 kSkew. Hence
//     error >= |c' - ĉ| + ω |c|,    rest >= sqrt(|c|² - max(0, |c'| - ω |c|)²),    norm >= |ĉ|,
// and for a query norm >= |q'| + ω |q| and |q̂| as well. What is compared with a threshold is the float32 rounding of <q, c>, off by
// D 2^-24 |q| |c| at most, and the bound itself is computed in float32, off by 28 * 2^-24 of |Eq| (|c| + |ĉ|) + |q2| |c| at most. With
// s = (D + 64) 2^-24, s (|c| + |ĉ|) in `error` and s |c| in `rest` cover both, as |Eq| + |q2| >= |q|.
//
// Sixteen rows lie together in a block, so that lanes are rows and nothing is added across lanes. To save bytes they share one scale, and
// the largest error and norm; rests are whole numbers of 16 bits, rounded up, times a unit. Rows with numbers that are not finite, or
// longer than 2^60, have no bound: their block's error is NaN, and so all of its bounds, which rules out nothing. A block is a header
// (PrefixHeader) and codes [P / 4][row][4]. Blocks count the gallery's rows (item * tokens + token) through, whatever its shards; or,
// beside lists, the rows in the order of these, so that what a query visits of a list lies together.
#pragma once

#include <cstdint>

#include "lists.hpp"
#include "tiles.hpp"

namespace dqe::cpu {

constexpr int64_t kMostPrefix = 1024;  // products of so many codes are whole numbers of float32
constexpr double kSkew = 1e-5;
// Rows that miss the level's end cost a gathered row of codes each, in rows of codes that are swept in order. Measured.
constexpr int64_t kGatheredCost = 12;

struct Prefix {
    int64_t covered, width;  // the gallery's first items; P, a multiple of 16
    const float* axes;       // (P, D)
    const uint8_t* blocks;   // (ceil(covered * tokens / 16), prefix_block_bytes(P))
};

inline int64_t prefix_block_bytes(int64_t width) { return kPrefixRows * width + int64_t{sizeof(PrefixHeader)}; }
inline int64_t prefix_blocks(int64_t rows) { return (rows + kPrefixRows - 1) / kPrefixRows; }

// max of |A Aᵀ - I|, as a Frobenius norm.
double skew(const float* axes, int64_t count, int64_t width);

// Encodes all rows of the sources, in this order, or where it is null in their own. `axes`: skew at most kSkew.
void fill_prefix(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const float* axes, int64_t count,
                 const uint32_t* order, uint8_t* blocks, int threads);

// One query: signed codes (P,), and its numbers.
PrefixQuery encode_prefix_query(const float* query, int64_t width, const float* axes, int64_t count, int8_t* codes);

}  // namespace dqe::cpu
