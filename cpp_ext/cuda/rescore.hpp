// What is between the pass over the codes and the scores: which tokens are scored, and what their scores make of the list.
#pragma once

#include "screening.hpp"

namespace dqe::cuda {

// Lays out the tokens of the pairs that still reach their query's limit. `failed`: pairs or columns are missing.
__global__ __launch_bounds__(kThreads) void spread_pairs(Pairs pairs, Columns columns, Candidates list, int rows, int64_t tokens,
                                                         volatile unsigned* failed) {
    admit_next();
    await_previous();
    const int64_t tile = blockIdx.x, room = columns.capacity;
    const int64_t found = static_cast<int64_t>(pairs.counts[tile]), count = found < pairs.capacity ? found : pairs.capacity;
    if (found > count && threadIdx.x == 0) *failed = 1;
    for (int64_t base = int64_t{blockIdx.y} * kThreads; base < count; base += int64_t{gridDim.y} * kThreads) {
        const int64_t at = tile * pairs.capacity + base + threadIdx.x;
        unsigned wanted = 0;
        if (base + threadIdx.x < count && !(pairs.bounds[at] < list.limit_keys[tile * rows + pairs.rows[at]])) wanted = pairs.tokens[at];
        const int mine = __popc(wanted);
        int before = 0, all = 0;  // in the lanes before this one, and in all
        for (int bit = 0; bit < 6; ++bit) {
            const unsigned lanes = __ballot_sync(kAllLanes, mine >> bit & 1);
            before += __popc(lanes & ((1u << threadIdx.x % 32) - 1)) << bit, all += __popc(lanes) << bit;
        }
        unsigned long long place = 0;
        if (all > 0 && threadIdx.x % 32 == 0) place = atomicAdd(&columns.counts[tile], static_cast<unsigned long long>(all));
        place = __shfl_sync(kAllLanes, place, 0) + before;
        const bool fits = static_cast<int64_t>(place) + mine <= room;
        if (!fits) *failed = 1;
        if (base + threadIdx.x < count) pairs.places[at] = wanted && fits ? static_cast<int>(place) : -1;
        for (int64_t to = tile * room + static_cast<int64_t>(place); fits && wanted; ++to, wanted &= wanted - 1) {
            columns.tokens[to] = pairs.items[at] * tokens + __ffs(static_cast<int>(wanted)) - 1;
            columns.rows[to] = pairs.rows[at];
        }
    }
}

// The scores of the pairs' items: the largest of their tokens', NaN if one is. A token that was left out is below the limit, so that an
// item whose score reaches it has its own. `rescored`: how many tokens were scored.
__global__ __launch_bounds__(kThreads) void collect_scores(Pairs pairs, Columns columns, Candidates list, int rows,
                                                           volatile unsigned* rescored) {
    admit_next();
    await_previous();
    const int64_t tile = blockIdx.x, found = static_cast<int64_t>(pairs.counts[tile]);
    for (int64_t i = int64_t{blockIdx.y} * kThreads + threadIdx.x; i < found && i < pairs.capacity; i += int64_t{gridDim.y} * kThreads) {
        const int64_t at = tile * pairs.capacity + i;
        if (pairs.places[at] < 0) continue;
        const float* scores = columns.scores + tile * columns.capacity + pairs.places[at];
        float best = scores[0];
        for (int token = 1; token < __popc(pairs.tokens[at]); ++token) best = nan_max(best, scores[token]);
        const int64_t query = tile * rows + pairs.rows[at], item = pairs.items[at];
        if (within_limit<double>(best, item, list.limit_keys[query], list.limit_ids[query])) append_one(list, query, best, item, best);
    }
    if (tile || blockIdx.y || threadIdx.x) return;
    unsigned total = 0;
    for (unsigned other = 0; other < gridDim.x; ++other) total += static_cast<unsigned>(columns.counts[other]);
    *rescored = *rescored + total;  // of all blocks of queries since it was lowered
}

}  // namespace dqe::cuda
