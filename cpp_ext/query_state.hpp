// What a sweep holds of a query: the best so far, candidates whose zone is not known yet, picks; and the thresholds that say which
// scores can still change any of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "reservoir.hpp"
#include "tiles.hpp"
#include "zone_select.hpp"

namespace dqe::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The rank in a sample of `sampled` items at which, almost surely, fewer than `rank` entries of all `size` are better: three standard
// deviations of a Poisson count and three more. 0 where the sample is too small to tell.
inline int64_t sampled_rank(int64_t rank, int64_t sampled, int64_t size) {
    if (rank == 0 || sampled == 0) return 0;
    const double expected = static_cast<double>(rank) * static_cast<double>(sampled) / static_cast<double>(size);
    const auto safe = static_cast<int64_t>(expected + 3.0 * std::sqrt(expected) + 3.0) + 1;
    return safe <= sampled / 4 ? safe : 0;
}

// A threshold for the best of the whole, guessed from a sample: the score, or its estimate, at some rank of it. While a sample is
// scored, each thread keeps its best down to that rank alone; whatever it drops is no better than the guess. An estimated sample is
// swept again: it drops nothing, and keeps nothing. So the best entries that are found at the end are the best of all if the worst of them
// is above the guess, or at the guess with nothing dropped.
struct Guess {
    float threshold = -kInfinity;
    bool dropped = false;

    bool holds(int64_t kept, int64_t wanted, float worst) const {
        if (threshold == -kInfinity) return true;
        return kept == wanted && (worst > threshold || (worst == threshold && !dropped));
    }
};

// What one query has seen on one thread. Candidates of thousands of queries come in no order: what most of them touch is together.
struct alignas(64) QueryState {
    Reservoir field;
    float easy_below;            // all scores below this are easy
    float best;                  // where the anchor is the best score
    int64_t taken, not_numbers;  // candidates that reached the threshold: with a score, and without
    Reservoir top;
    int64_t counts[3];
    int drawn;
    bool scattered = false;  // its lists left too much
    BestHeap<double> picks;
    double unreachable;             // a softmax pick with 1 - u above this is none of the best
    uint32_t drawn_ids[kUniforms];  // of the mid zone, waiting for their random numbers
    float drawn_scores[kUniforms];
};

// The lowest threshold t such that every score below t has Δ = anchor - score > hi, by bisection over all floats.
inline float easy_threshold(float anchor, float hi) {
    if (!std::isfinite(anchor) || !(hi < kInfinity)) return -kInfinity;
    if (!(anchor - std::numeric_limits<float>::lowest() > hi)) return -kInfinity;
    uint32_t easy = order_image(std::numeric_limits<float>::lowest()), not_easy = order_image(kInfinity);
    while (not_easy - easy > 1) {
        const uint32_t middle = easy + (not_easy - easy) / 2;
        (anchor - score_of_image(middle) > hi ? easy : not_easy) = middle;
    }
    return score_of_image(not_easy);
}

// A softmax pick's key is score / τ - log(-log u). As -log u >= 1 - u, and a mid score is at most anchor - lo, it stays below
// the worst key kept if 1 - u > exp((anchor - lo) / τ - worst): one comparison instead of two logarithms. The margin is far
// above the rounding of either side.
inline double unreachable_above(const ZoneBounds& bounds, double temperature, double worst) {
    const double anchor = bounds.anchor, lo = bounds.lo;
    const double best = (anchor - lo + 1e-6 * (std::abs(anchor) + std::abs(lo))) / temperature;
    return std::exp(best - worst + 1e-6 * (1.0 + std::abs(best) + std::abs(worst)));
}

}  // namespace dqe::cpu
