// The kernels that work per query rather than per item: preparing queries, finishing candidate lists, ranks and bounds.
#pragma once

#include "../zone_select.hpp"
#include "consumers.hpp"
#include "ptx.hpp"
#include "scan.hpp"
#include "sorting.hpp"

namespace dqe::cuda {

__device__ inline bool is_finite(float x) { return x - x == 0.0f; }

// By one warp, a row of the prepared queries: chunks as the product reads them, zeros beyond D and beyond the batch.
//
// For tensor cores a float32 query is scaled by the power of two that puts its largest coordinate in [2^14, 2^15), and split
// into two float16 parts whose sum keeps at least 22 bits of every coordinate within 2^-25 of the largest, and of the others as
// much as leaves an absolute error below 2^-39 of the largest. `unscale` undoes it, exactly.
template <Product product>
__device__ void prepare_query(const unsigned char* queries, bool half, int64_t batch, int64_t width, int64_t query, int rows, int chunks,
                              unsigned char* prepared, float* unscale) {
    constexpr int kElements = Format<product>::chunk_elements, kParts = Format<product>::query_parts;
    const int lane = threadIdx.x;
    const bool real = query < batch;
    const auto coordinate = [&](int64_t d) {
        if (!real || d >= width) return 0.0f;
        const int64_t at = query * width + d;
        return half ? half_to_float(reinterpret_cast<const uint16_t*>(queries)[at]) : reinterpret_cast<const float*>(queries)[at];
    };

    float scale = 1.0f;
    if (product == Product::split_half) {
        float largest = 0.0f, sum = 0.0f;
        for (int64_t d = lane; d < width; d += 32) {
            const float x = coordinate(d);
            if (is_finite(x)) largest = fmaxf(largest, fabsf(x));
            if (x != x) sum = x;
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
            sum += __shfl_xor_sync(kAllLanes, sum, distance);  // NaN if any coordinate is
        }
        int exponent = 15;
        if (largest > 0.0f) frexpf(largest, &exponent);
        const int shift = 15 - exponent < 126 ? 15 - exponent : 126;  // 126: its inverse is still a normal number
        scale = ldexpf(1.0f, shift);
        if (lane == 0 && real) unscale[query] = ldexpf(1.0f, -shift) + sum;
    } else if (lane == 0 && real) {
        unscale[query] = 1.0f;
    }

    unsigned char* tile = prepared + query / rows * chunks * kParts * rows * kChunkBytes;
    for (int64_t d = lane; d < int64_t{chunks} * kElements; d += 32) {
        unsigned char* row = tile + ((d / kElements * kParts) * rows + query % rows) * kChunkBytes;
        const float x = coordinate(d) * scale;
        if constexpr (product == Product::single) {
            reinterpret_cast<float*>(row)[d % kElements] = x;
        } else {
            const uint16_t high = float_to_half(x);
            reinterpret_cast<uint16_t*>(row)[d % kElements] = high;
            if constexpr (product == Product::split_half) {
                const float rest = x - half_to_float(high);  // exact; NaN for an infinite coordinate, whose rest is 0
                reinterpret_cast<uint16_t*>(row + rows * kChunkBytes)[d % kElements] = is_finite(rest) ? float_to_half(rest) : uint16_t{0};
            }
        }
    }
}

// Refuse positions outside the items: flag them and read item 0 instead. Unused rows read item 0 as well.
__global__ void gather_ids(const int64_t* ids, int64_t batch, int64_t size, int64_t* gather, int64_t rows, volatile unsigned* bad) {
    const int64_t query = int64_t{blockIdx.x} * 32 + threadIdx.x;
    if (query >= rows) return;
    const int64_t id = query < batch ? ids[query] : 0;
    const bool inside = id >= 0 && id < size;
    gather[query] = inside ? id : 0;
    if (!inside) *bad = 1;
}

// `held`: entries that the list is taken to have, whatever will write them.
__device__ inline void reset_list(const Candidates& list, int64_t query, int64_t held) {
    list.counts[query] = static_cast<unsigned long long>(held);
    list.limit_keys[query] = -__uint_as_float(0x7F800000);
    list.limit_ids[query] = -1;
    list.pending[query] = 1;
}

__global__ void reset_candidates(Candidates list, int64_t batch, int64_t held) {
    const int64_t query = int64_t{blockIdx.x} * 32 + threadIdx.x;
    if (query < batch) reset_list(list, query, held);
}

struct Finished {
    float* scores;  // (batch, width); may be null where width is 0
    int64_t* ids;
    int64_t width;
    float* best;  // (batch), or null: the best entry's score, NaN where there is none
};

// One block per query: sort what its list holds. An incomplete list (`last` false: only some items were offered, or more passed
// than it holds) gives a better limit and is emptied; a complete one is written out. `overflowed` is set by the former if `last`.
__global__ __launch_bounds__(kSortThreads) void finish_candidates(Candidates list, Finished out, bool last, volatile unsigned* overflowed) {
    admit_next();
    await_previous();
    const int64_t query = blockIdx.x;
    if (!list.pending[query]) return;
    const unsigned long long count = list.counts[query];
    const bool complete = last && count <= static_cast<unsigned long long>(list.capacity);
    const int64_t held = count < static_cast<unsigned long long>(list.capacity) ? static_cast<int64_t>(count) : list.capacity;
    int64_t size = 1;
    while (size < held) size *= 2;  // no more than the capacity, which is a power of two
    double* keys = list.keys + query * list.capacity;
    int64_t* ids = list.ids + query * list.capacity;
    float* scores = list.scores + query * list.capacity;
    const float lowest = -__uint_as_float(0x7F800000);

    // After the sort: the limit, the output. `k`, `i` and `s` are the entries in either memory.
    const auto conclude = [&](auto k, auto i, auto s) {
        if (!complete) {
            if (threadIdx.x == 0 && held >= list.wanted) {
                list.limit_keys[query] = k[list.wanted - 1];
                list.limit_ids[query] = i[list.wanted - 1];
            }
        } else {
#pragma unroll 1  // unrolled, they take registers that a block of this size lacks on sm_80
            for (int64_t place = threadIdx.x; place < out.width; place += kSortThreads) {
                out.scores[query * out.width + place] = place < held ? static_cast<float>(s[place]) : lowest;
                out.ids[query * out.width + place] = place < held ? static_cast<int64_t>(i[place]) : -1;
            }
            if (threadIdx.x == 0 && out.best) out.best[query] = held ? static_cast<float>(s[0]) : __uint_as_float(0x7FC00000);
        }
        __syncthreads();  // all have read count and pending
        if (threadIdx.x == 0) {
            if (complete) list.pending[query] = 0;
            if (!complete) list.counts[query] = 0;
            if (last && !complete) *overflowed = 1;
        }
    };

    const Shared<unsigned char> shared = shared_memory();
    const Shared<double> k = shared_view<double>(shared);
    const Shared<int64_t> i = shared_view<int64_t>(shared + kSharedSort * 8);
    const Shared<float> s = shared_view<float>(shared + kSharedSort * 16);
    const int64_t kept = gather_best(keys, ids, scores, held, list.wanted, k, i, s, shared_view<unsigned>(shared));
    if (kept > 0 || held == 0) {
        for (size = 1; size < kept;) size *= 2;
#pragma unroll 1
        for (int64_t at = kept + threadIdx.x; at < size; at += kSortThreads) k[at] = lowest, i[at] = -1, s[at] = lowest;
        sort_entries(k, i, s, size, 0);
        conclude(k, i, s);
    } else {
#pragma unroll 1
        for (int64_t at = held + threadIdx.x; at < size; at += kSortThreads) keys[at] = lowest, ids[at] = -1, scores[at] = lowest;
        __syncthreads();
        sort_long(keys, ids, scores, size, k, i, s);
        conclude(keys, ids, scores);
    }
}

struct RankState {
    unsigned long long* bins;  // (batch, 2, kBins)
    uint32_t* prefixes;        // (batch, 2)
    int64_t* left;             // (batch, 2): rank among the scores that share the prefix
    float* scores;             // (batch, 2): the score at each rank, NaN where a query has no candidate
    double lo, hi;             // ranks as fractions
};

// One warp per query and rank: the bin that holds the rank extends the prefix.
__global__ void descend_ranks(RankState state, int level) {
    const int64_t query = blockIdx.x, which = blockIdx.y, at = query * 2 + which;
    const int lane = threadIdx.x;
    const unsigned long long* bins = state.bins + (level == 0 ? query * 2 : at) * kBins;
    int64_t mine = 0;
    for (int i = 0; i < kBins / 32; ++i) mine += static_cast<int64_t>(bins[lane * (kBins / 32) + i]);
    int64_t below = 0, total = 0;  // in the lanes before this one, and in all
    for (int other = 0; other < 32; ++other) {
        const int64_t theirs = __shfl_sync(kAllLanes, mine, other);
        if (other < lane) below += theirs;
        total += theirs;
    }
    if (level == 0 && total == 0) {
        if (lane == 0) state.left[at] = -1;  // no candidates
        if (lane == 0) state.scores[at] = __uint_as_float(0x7FC00000);
        return;
    }
    int64_t rank =
        level == 0 ? static_cast<int64_t>(floor((which ? state.hi : state.lo) * static_cast<double>(total - 1))) : state.left[at];
    __syncwarp();
    if (rank < below || rank >= below + mine) return;  // exactly one lane goes on; none where there are no candidates
    rank -= below;
    int bin = lane * (kBins / 32);
    while (rank >= static_cast<int64_t>(bins[bin])) rank -= static_cast<int64_t>(bins[bin++]);
    const uint32_t above = level == 0 ? 0 : state.prefixes[at];
    const uint32_t prefix = above << (level == kLevels - 1 ? 10 : 11) | static_cast<uint32_t>(bin);
    state.prefixes[at] = prefix;
    state.left[at] = rank;
    if (level == kLevels - 1) state.scores[at] = score_of_image(prefix);
}

struct Bounds {
    const float* given_anchor;  // (batch), or null: the anchor is already in place
    float* anchor;              // (batch)
    float* lo;
    float* hi;
    const float* rank_scores;  // (batch, 2), or null for absolute bounds
    double absolute_lo, absolute_hi;
};

// Also empties the list of picks and the counts, for those that are given here.
__global__ void resolve_bounds(Bounds bounds, int64_t batch, Candidates picks, int64_t* counts) {
    const int64_t query = int64_t{blockIdx.x} * 32 + threadIdx.x;
    if (query >= batch) return;
    if (picks.counts) reset_list(picks, query, 0);
    for (int zone = 0; counts && zone < 3; ++zone) counts[query * 3 + zone] = 0;
    if (bounds.given_anchor) bounds.anchor[query] = bounds.given_anchor[query];
    const float anchor = bounds.anchor[query];
    bounds.lo[query] = bounds.rank_scores ? anchor - bounds.rank_scores[query * 2] : static_cast<float>(bounds.absolute_lo);
    bounds.hi[query] = bounds.rank_scores ? anchor - bounds.rank_scores[query * 2 + 1] : static_cast<float>(bounds.absolute_hi);
}

}  // namespace dqe::cuda
