// Clusters of a gallery's tokens that a query may skip with certainty, so that a search reads what can matter and not the whole.
//
// A list holds tokens around a direction u, |u| = 1. A token t at angle ρ from u, and a query q at angle θ from u, are at least θ - ρ
// apart, so that
//     <q, t> <= |q| |t| cos(max(0, θ - ρ)).
// With x = <q, u> = |q| cos θ, this is |q| |t| where x >= |q| cos ρ, and else |t| (x cos ρ + sqrt(|q|² - x²) sin ρ). It grows with x, with
// |q| and with ρ: an upper bound of x (from the codes of u, screen.hpp), an upper bound of |q| and a cosine that was rounded down can only
// raise it. A negative value is taken as 0, since |t| may be any number up to the list's longest. What is compared with a threshold is the
// float32 rounding of <q, t>, off by (D + 32) * 2^-24 * |q| |t| at most, and u is a unit vector only to 1e-6: `Reach` adds both.
//
// Within a list, tokens are ordered by ρ, the widest first: those that can reach a threshold are the first so many of them. Tokens with
// numbers that are not finite, or longer than 2^60, have no bound; they come before the first list, and are always visited.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "aligned.hpp"
#include "cluster.hpp"
#include "tiles.hpp"

namespace dqe::cpu {

struct TokenLists {
    int64_t count, covered;   // lists; the gallery's first items, whose tokens they hold
    CodedRows directions;     // (count,), in blocks, as codes_in_blocks makes them
    const float* longest;     // (count,): the largest norm, rounded up; 0 where the list is empty
    const float* widest;      // (count,): cos ρ of the list's first token, rounded down
    const int64_t* starts;    // (count + 1,): where in `rows` each list starts
    const uint32_t* rows;     // (covered * tokens,): item * tokens + token
    const uint16_t* cosines;  // (covered * tokens,): cos ρ, rounded down: code / 32767.5 - 1
};

// The largest code that stands for no more than `cosine`.
inline uint16_t cosine_code(double cosine) { return static_cast<uint16_t>(std::clamp((cosine - 1e-12 + 1.0) * 32767.5, 0.0, 65535.0)); }

// Which tokens of lists one query can have use for.
class Reach {
  public:
    // `norm`: at least |q|. NaN: there is no bound, everything is within reach.
    Reach(double norm, int64_t width) : norm_(norm), slack_(norm * (static_cast<double>(width + 32) * 0x1p-24 + 1e-6)) {}

    // Of a list with norms up to `longest`, around a direction whose product with the query is at most x: the largest code of a token that
    // can score `threshold` or more; -1 where none can. With m = threshold / longest - slack and cos φ = m / |q|, a token at ρ is ruled out
    // where m > 0 and θ - ρ > φ. That takes θ > φ, or x < m, and is then cos ρ > cos(θ - φ) = (x m + sqrt((|q|² - x²) (|q|² - m²))) / |q|²,
    // which also implies x < |q| cos ρ; all are, where m > |q|. The roots turn a rounding of 2^-53 into 2^-26 at most: 1e-6 is far above.
    int64_t last_code(float x, float longest, float threshold) const {
        const double along = std::max(x + 1e-6 * norm_, -norm_), most = double{threshold} / longest - slack_;
        if (!(most > 0.0) || !(along < most)) return 65535;  // NaN, too
        if (most > norm_) return -1;
        const double across = std::sqrt((norm_ - along) * (norm_ + along)) * std::sqrt((norm_ - most) * (norm_ + most));
        const double cosine = std::min(1.0, (along * most + across) / (norm_ * norm_) + 1e-6);
        return static_cast<int64_t>(std::floor((cosine + 1.0) * 32767.5));
    }

    float norm() const { return static_cast<float>(norm_); }  // a float32 to begin with
    float slack() const { return std::nextafter(static_cast<float>(slack_), std::numeric_limits<float>::infinity()); }

  private:
    double norm_, slack_;
};

// (count, width) codes in blocks of kPrefixRows, [width / 4][row][4].
AlignedVector<uint8_t> codes_in_blocks(const uint8_t* codes, int64_t count, int64_t width);

// Sorts the tokens of `sources` into lists, that of each its leaf in the tree. `directions` is (leaves, width), unit vectors. Writes
// longest, widest, starts (whose first entry counts the tokens without a bound), rows and cosines.
void fill_lists(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const TokenTree& tree,
                const float* directions, float* longest, float* widest, int64_t* starts, uint32_t* rows, uint16_t* cosines, int threads);

}  // namespace dqe::cpu
