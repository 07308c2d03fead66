// Launchers of the zone kernels on the CPU: raw pointers and sizes, parallel over queries, nothing thrown.
// Rows are independent, so no result depends on `threads` (0: one per processor) or on how items are tiled.
#pragma once

#include <cstdint>

#include "zone_select.hpp"

namespace dqe::cpu {

// A tile of scores (queries, items), row-major, of the items from position `first_item` on.
struct ScoreTile {
    const float* scores;
    int64_t queries, items, first_item;
};

// (queries, k) heaps, filled with (-inf, -1) before the first tile.
struct TopK {
    float* scores;
    int64_t* ids;
    int64_t k;
};

// Per query: bounds (queries,), counts (queries, 3) from zero on, and pick heaps (queries, picks), keys filled with -inf and
// ids with -1. `first_query` is the row of the whole batch that row 0 stands for: pick keys depend on it.
struct Zones {
    const float *anchor, *lo, *hi;
    int64_t* counts;
    double* pick_keys;
    int64_t* pick_ids;
    float* pick_scores;
    int64_t picks, first_query;
};

// Per query: a buffer (queries, 2 * capacity) that holds the `capacity` best scores among others, how much of it is filled,
// a score below which nothing can be among them, and the number of scores that are not NaN. Fills and counts start at 0.
struct Ranking {
    float* buffer;
    int64_t* fill;
    float* threshold;
    int64_t* valid;
    int64_t capacity;
};

void update_top_k(const ScoreTile& tile, const TopK& state, int threads) noexcept;
void sort_top_k(const TopK& state, int64_t queries, int threads) noexcept;

void update_zones(const ScoreTile& tile, const PickRule& rule, const Zones& state, int threads) noexcept;
void sort_picks(const Zones& state, int64_t queries, int threads) noexcept;

void update_ranking(const ScoreTile& tile, const Ranking& state, int threads) noexcept;

// scores[b] = the score at rank floor(quantile * (valid[b] - 1)), best first; NaN where valid[b] is 0. Every such rank must
// be below the capacity. Reorders the buffers and leaves them usable.
void score_at_rank(const Ranking& state, int64_t queries, double quantile, float* scores, int threads) noexcept;

}  // namespace dqe::cpu
