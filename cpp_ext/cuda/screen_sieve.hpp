// Screening: which items may be among the best is told from bounds of their scores, at half or a quarter of the bytes, and only those are
// scored. A pass over the codes (screen_kernel) writes down two things:
//  - pairs of a query and an item with a token whose upper bound reaches the limit, and which tokens these are;
//  - items whose lower bound reaches it, in the list of the best. The wanted-th best of these bounds the wanted-th best score from below,
//    so that a limit which a small sample left becomes a sharp one, before anything is scored.
// Then spread_pairs lays out the tokens of the pairs that reach the new limit, scan_kernel<Gather> scores them with the code that scores
// anchors, and collect_scores folds tokens into items. What is scored is therefore equal to the bit to what a pass over the items finds.
#pragma once

#include "codes.hpp"
#include "sieve.hpp"

namespace dqe::cuda {

// In no order, per query tile. `tokens`: a bit for each token of the item whose bound reached the limit. A count that exceeds the capacity
// means that some are missing.
struct Pairs {
    int64_t* items;
    unsigned* tokens;
    int* rows;      // of the query tile
    float* bounds;  // the largest of the item's; NaN where a token has none
    int* places;    // of its first token in Columns, or -1
    unsigned long long* counts;
    int64_t capacity;
};

// The tokens to be scored, per query tile.
struct Columns {
    int64_t* tokens;  // positions in (items, tokens)
    int* rows;
    float* scores;
    unsigned long long* counts;
    int64_t capacity;
};

struct Screening {
    CodedItems items;
    CodedQueries queries;
    Candidates list;
    Pairs pairs;
};

constexpr int kPairQueueBytes = kQueued * 20;

__host__ __device__ constexpr int64_t screen_bytes(int query_rows, int chunks) {
    return sieve_ring(query_rows, 1, chunks) + sieve_stages(query_rows, 1, false) * kItemStageBytes + kWarps * kPairQueueBytes;
}

// Pairs that a warp has found; they go to memory together, with one atomic operation.
class PairQueue {
  public:
    __device__ PairQueue(const Pairs& pairs, Shared<unsigned char> queues) : pairs_(pairs) {
        const Shared<unsigned char> mine = queues + static_cast<int>(threadIdx.x / 32) * kPairQueueBytes;
        items_ = shared_view<int64_t>(mine), tokens_ = shared_view<unsigned>(mine + kQueued * 8);
        rows_ = shared_view<int>(mine + kQueued * 12), bounds_ = shared_view<float>(mine + kQueued * 16);
    }

    __device__ void push(bool wanted, int row, int64_t item, unsigned tokens, float bound) {
        const unsigned mask = __ballot_sync(kAllLanes, wanted);
        if (queued_ + __popc(mask) > kQueued) flush();
        if (wanted) {
            const int at = queued_ + __popc(mask & ((1u << threadIdx.x % 32) - 1));
            items_[at] = item, tokens_[at] = tokens, rows_[at] = row, bounds_[at] = bound;
        }
        queued_ += __popc(mask);
    }

    __device__ void flush() {
        __syncwarp();
        unsigned long long first = 0;
        if (queued_ > 0 && threadIdx.x % 32 == 0) first = atomicAdd(&pairs_.counts[blockIdx.x], static_cast<unsigned long long>(queued_));
        first = __shfl_sync(kAllLanes, first, 0);
        for (int at = threadIdx.x % 32; at < queued_; at += 32) {
            const int64_t place = static_cast<int64_t>(first) + at;
            if (place >= pairs_.capacity) break;
            const int64_t to = int64_t{blockIdx.x} * pairs_.capacity + place;
            pairs_.items[to] = items_[at], pairs_.tokens[to] = tokens_[at], pairs_.rows[to] = rows_[at], pairs_.bounds[to] = bounds_[at];
        }
        __syncwarp();
        queued_ = 0;
    }

  private:
    const Pairs& pairs_;
    Shared<int64_t> items_;
    Shared<unsigned> tokens_;
    Shared<int> rows_;
    Shared<float> bounds_;
    int queued_ = 0;
};

template <int Rows>
class ScreenSieve {
    using Products = Accumulators<Product::codes, Rows>;
    using L = Lane<Products>;

  public:
    __device__ ScreenSieve(const Scan& scan, const Screening& screening, Shared<unsigned char> queues)
        : scan_(scan), screening_(screening), queue_(screening.pairs, queues) {
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            const int64_t query = L::query_of(group);
            const bool asked = query < scan.batch && screening.queries.errors[query] == screening.queries.errors[query];
            asked_[group] = asked;  // a query without a bound is not screened
            scale_[group] = asked ? screening.queries.scales[query] : 0.0f;
            norm_[group] = asked ? screening.queries.norms[query] : 0.0f;
            error_[group] = asked ? screening.queries.errors[query] : 0.0f;
            limit_[group] = asked ? static_cast<float>(screening.list.limit_keys[query]) : __uint_as_float(0x7F800000);
        }
        fetch(blockIdx.y);
    }

    // The largest product and the largest numbers of a lane's columns give a bound that none of theirs exceeds, rounding included, since
    // every operation ascends. Only where it reaches the limit, or is NaN, are they looked at one by one.
    __device__ void take(const ColumnTile& columns, const Products& products) {
        float most_error = item_errors_[0], most_norm = item_norms_[0];
#pragma unroll
        for (int place = 1; place < L::kPlaces; ++place)
            most_error = nan_max(most_error, item_errors_[place]), most_norm = nan_max(most_norm, item_norms_[place]);
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            float most = L::value_of(products, group, 0) * item_scales_[0];
#pragma unroll
            for (int place = 1; place < L::kPlaces; ++place) most = fmaxf(most, L::value_of(products, group, place) * item_scales_[place]);
            const float slack = fmaf(norm_[group], most_error, error_[group] * most_norm);
            if (__ballot_sync(kAllLanes, asked_[group] && !(fmaf(most, scale_[group], slack) < limit_[group])))
                offer(columns, products, group);
        }
        fetch(columns.tile + gridDim.y);
    }

    __device__ void end() { queue_.flush(); }

  private:
    // The numbers of this lane's columns in a tile, which neighbours two by two have: asked for while the tile before is multiplied. Where
    // the number of tokens is odd, there is one more of each.
    __device__ void fetch(int64_t tile) {
        const int64_t first = tile * kColumns + L::column_of(0), all = scan_.size * scan_.tokens;
        const int left = first < all && tile < scan_.tiles ? static_cast<int>(all - first < kColumns ? all - first : kColumns) : 0;
        const float *scales = screening_.items.scales + first, *errors = screening_.items.errors + first,
                    *norms = screening_.items.norms + first;
#pragma unroll
        for (int place = 0; place < L::kPlaces; place += 2) {
            const int column = place / 2 * 8;
            float2 scale = {}, error = {}, norm = {};
            if (column < left) {
                scale = *reinterpret_cast<const float2*>(scales + column), error = *reinterpret_cast<const float2*>(errors + column);
                norm = *reinterpret_cast<const float2*>(norms + column);
            }
            item_scales_[place] = scale.x, item_errors_[place] = error.x, item_norms_[place] = norm.x;
            item_scales_[place + 1] = scale.y, item_errors_[place + 1] = error.y, item_norms_[place + 1] = norm.y;
        }
    }

    __device__ __forceinline__ void offer(const ColumnTile& columns, const Products& products, int group) {
        const int64_t query = L::query_of(group);
        const int tokens = static_cast<int>(scan_.tokens), left = Products::left(threadIdx.x / 32);
        const float limit = limit_[group];
        float upper[L::kPlaces], lower[L::kPlaces];
        unsigned reaching = 0;  // by column of the warp, at most 32
#pragma unroll
        for (int place = 0; place < L::kPlaces; ++place) {
            const float product = L::value_of(products, group, place) * item_scales_[place];
            const float slack = fmaf(norm_[group], item_errors_[place], error_[group] * item_norms_[place]);
            upper[place] = fmaf(product, scale_[group], slack), lower[place] = fmaf(product, scale_[group], -slack);
            const int column = L::column_of(place);
            reaching |= unsigned{column < columns.columns && asked_[group] && !(upper[place] < limit)} << (column - left);
        }
        for (int distance = 1; distance < 4; distance *= 2) reaching |= __shfl_xor_sync(kAllLanes, reaching, distance);
        if (tokens > 1) L::fold(upper, tokens), L::fold(lower, tokens);  // NaN where a token's is: the item may not rank at all
        unsigned places = 0;                                             // that stand for an item with a token that reaches the limit
        const unsigned whole = tokens < 32 ? (1u << tokens) - 1 : kAllLanes;
#pragma unroll
        for (int place = 0; place < L::kPlaces; ++place) {
            const int column = L::column_of(place);
            places |= unsigned{(column & (tokens - 1)) == 0 && (reaching >> (column - left) & whole) != 0} << place;
        }
        while (__ballot_sync(kAllLanes, places != 0)) {
            const int first = __ffs(static_cast<int>(places)) - 1;
            float most = upper[0], least = lower[0];
#pragma unroll
            for (int place = 1; place < L::kPlaces; ++place)
                if (place == first) most = upper[place], least = lower[place];
            const int column = L::column_of(first < 0 ? 0 : first);
            const int64_t item = columns.first_item + column / tokens;
            const bool wanted = places && !is_excluded(scan_, query, item);
            queue_.push(wanted, L::row_of(group), item, reaching >> (column - left) & whole, most);
            if (wanted && within_limit<float>(least, item, limit, screening_.list.limit_ids[query]))
                append_one(screening_.list, query, least, item, least);
            places &= places - 1;
        }
    }

    const Scan& scan_;
    const Screening& screening_;
    PairQueue queue_;
    bool asked_[L::kGroups];
    float scale_[L::kGroups], norm_[L::kGroups], error_[L::kGroups], limit_[L::kGroups];
    float item_scales_[L::kPlaces], item_errors_[L::kPlaces], item_norms_[L::kPlaces];  // of this lane's columns
};

template <int Rows>
__global__ __launch_bounds__(kThreads, 2) void screen_kernel(Scan scan, Screening screening) {
    constexpr int kStages = sieve_stages(Rows, 1, false);
    const int ring = static_cast<int>(sieve_ring(Rows, 1, scan.chunks));
    ScreenSieve<Rows> sieve(scan, screening, shared_memory() + (ring + kStages * kItemStageBytes));
    multiply_items<Product::codes, Rows, true, kStages>(
        scan, ring, kItemStageBytes,
        [&](const ColumnTile& columns, int64_t, const Accumulators<Product::codes, Rows>& products) { sieve.take(columns, products); });
    sieve.end();
}

// Lays out the tokens of the pairs that still reach their query's limit. `failed`: pairs or columns are missing.
__global__ __launch_bounds__(kThreads) void spread_pairs(Pairs pairs, Columns columns, Candidates list, int rows, int64_t tokens,
                                                         volatile unsigned* failed) {
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
