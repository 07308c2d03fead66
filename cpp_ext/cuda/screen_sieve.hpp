// The pass over the codes: bounds of scores while their products are still in the registers, pairs and lower bounds to memory.
// screening.hpp says what for.
#pragma once

#include "screening.hpp"
#include "sieve.hpp"

namespace dqe::cuda {

constexpr int kPairQueueBytes = kQueued * 20, kBoundQueueBytes = kQueued * 24;

__host__ __device__ constexpr int64_t screen_bytes(int query_rows, int chunks) {
    return sieve_ring(query_rows, 1, chunks) + sieve_stages(query_rows, 1, false) * kItemStageBytes + kWarps * kPairQueueBytes;
}

// What a warp has found. Pairs go to memory many at a time, with one atomic operation, and lower bounds that reach the limit to the list of
// the best. `Deferred`: bounds wait in the queue, too, so that a warp seldom waits for memory. Otherwise they go at once, which takes fewer
// registers.
template <bool Deferred>
class PairQueue {
  public:
    // Pairs are of query tile `tile`, of `rows` rows.
    __device__ PairQueue(const Screening& screening, int tile, int rows, Shared<unsigned char> queues)
        : screening_(screening), tile_(tile), rows_a_tile_(rows) {
        const Shared<unsigned char> mine = queues + static_cast<int>(threadIdx.x / 32) * (Deferred ? kBoundQueueBytes : kPairQueueBytes);
        items_ = shared_view<int64_t>(mine), tokens_ = shared_view<unsigned>(mine + kQueued * 8);
        rows_ = shared_view<int>(mine + kQueued * 12), upper_ = shared_view<float>(mine + kQueued * 16);
        lower_ = shared_view<float>(mine + kQueued * 20);
    }

    // `row` is one of the tile's.
    __device__ void push(bool wanted, int row, int64_t item, unsigned tokens, float upper, float lower) {
        const unsigned mask = __ballot_sync(kAllLanes, wanted);
        if (queued_ + __popc(mask) > kQueued) flush();
        if (wanted) {
            const int at = queued_ + __popc(mask & ((1u << threadIdx.x % 32) - 1));
            items_[at] = item, tokens_[at] = tokens, rows_[at] = row, upper_[at] = upper;
            if constexpr (Deferred)
                lower_[at] = lower;
            else
                add(row, item, lower);
        }
        queued_ += __popc(mask);
    }

    __device__ void flush() {
        const Pairs& pairs = screening_.pairs;
        __syncwarp();
        unsigned long long first = 0;
        if (queued_ > 0 && threadIdx.x % 32 == 0) first = atomicAdd(&pairs.counts[tile_], static_cast<unsigned long long>(queued_));
        first = __shfl_sync(kAllLanes, first, 0);
#pragma unroll 1
        for (int at = threadIdx.x % 32; at < queued_; at += 32) {
            if constexpr (Deferred) add(rows_[at], items_[at], lower_[at]);
            const int64_t place = static_cast<int64_t>(first) + at;
            if (place >= pairs.capacity) continue;
            const int64_t to = int64_t{tile_} * pairs.capacity + place;
            pairs.items[to] = items_[at], pairs.tokens[to] = tokens_[at], pairs.rows[to] = rows_[at], pairs.bounds[to] = upper_[at];
        }
        __syncwarp();
        queued_ = 0;
    }

  private:
    __device__ void add(int row, int64_t item, float lower) const {
        const Candidates& list = screening_.list;
        const int64_t query = int64_t{tile_} * rows_a_tile_ + row;
        if (within_limit<double>(lower, item, list.limit_keys[query], list.limit_ids[query])) append_one(list, query, lower, item, lower);
    }

    const Screening& screening_;
    int tile_;
    int rows_a_tile_;
    Shared<int64_t> items_;
    Shared<unsigned> tokens_;
    Shared<int> rows_;
    Shared<float> upper_, lower_;
    int queued_ = 0;
};

// Where bounds of a span of a row's columns (32 or less, from `left` on; this lane has two of each eight) may reach the limit:
// `push(wanted, item, tokens, upper, lower)` for its items that do, by all lanes together. `tokens` has a bit for each that does.
template <int Places, typename Push>
__device__ __forceinline__ void offer_span(const Scan& scan, const ColumnTile& columns, int left, float (&upper)[Places],
                                           float (&lower)[Places], bool asked, float limit, int64_t query, const Push& push) {
    const int tokens = static_cast<int>(scan.tokens);
    const auto column_of = [](int place) { return place / 2 * 8 + static_cast<int>(threadIdx.x % 4 * 2) + place % 2; };  // of the span
    unsigned reaching = 0;  // by column of the span
#pragma unroll
    for (int place = 0; place < Places; ++place)
        reaching |= unsigned{left + column_of(place) < columns.columns && asked && !(upper[place] < limit)} << column_of(place);
    for (int distance = 1; distance < 4; distance *= 2) reaching |= __shfl_xor_sync(kAllLanes, reaching, distance);
    if (tokens > 1) fold(upper, tokens), fold(lower, tokens);  // NaN where a token's is: the item may not rank at all
    unsigned places = 0;                                       // that stand for an item with a token that reaches the limit
    const unsigned whole = tokens < 32 ? (1u << tokens) - 1 : kAllLanes;
#pragma unroll
    for (int place = 0; place < Places; ++place) {
        const int column = column_of(place);
        places |= unsigned{(column & (tokens - 1)) == 0 && (reaching >> column & whole) != 0} << place;
    }
    while (__ballot_sync(kAllLanes, places != 0)) {
        const int first = __ffs(static_cast<int>(places)) - 1;
        float most = upper[0], least = lower[0];
#pragma unroll
        for (int place = 1; place < Places; ++place)
            if (place == first) most = upper[place], least = lower[place];
        const int column = column_of(first < 0 ? 0 : first);
        const int64_t item = columns.first_item + (left + column) / tokens;
        push(places && !is_excluded(scan, query, item), item, reaching >> column & whole, most, least);
        places &= places - 1;
    }
}

template <int Rows>
class ScreenSieve {
    using Products = Accumulators<Product::codes, Rows>;
    using L = Lane<Products>;

  public:
    __device__ ScreenSieve(const Scan& scan, const Screening& screening, Shared<unsigned char> queues)
        : scan_(scan), screening_(screening), queue_(screening, static_cast<int>(blockIdx.x), Rows, queues) {
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
        float upper[L::kPlaces], lower[L::kPlaces];
#pragma unroll
        for (int place = 0; place < L::kPlaces; ++place) {
            const float product = L::value_of(products, group, place) * item_scales_[place];
            const float slack = fmaf(norm_[group], item_errors_[place], error_[group] * item_norms_[place]);
            upper[place] = fmaf(product, scale_[group], slack), lower[place] = fmaf(product, scale_[group], -slack);
        }
        offer_span(scan_, columns, Products::left(threadIdx.x / 32), upper, lower, asked_[group], limit_[group], L::query_of(group),
                   [&](bool wanted, int64_t item, unsigned tokens, float most, float least) {
                       queue_.push(wanted, L::row_of(group), item, tokens, most, least);
                   });
    }

    const Scan& scan_;
    const Screening& screening_;
    PairQueue<false> queue_;
    bool asked_[L::kGroups];
    float scale_[L::kGroups], norm_[L::kGroups], error_[L::kGroups], limit_[L::kGroups];
    float item_scales_[L::kPlaces], item_errors_[L::kPlaces], item_norms_[L::kPlaces];  // of this lane's columns
};

template <int Rows>
__global__ __launch_bounds__(kThreads, 2) void screen_kernel(Scan scan, Screening screening) {
    admit_next();
    await_previous();
    constexpr int kStages = sieve_stages(Rows, 1, false);
    const int ring = static_cast<int>(sieve_ring(Rows, 1, scan.chunks));
    ScreenSieve<Rows> sieve(scan, screening, shared_memory() + (ring + kStages * kItemStageBytes));
    multiply_items<Product::codes, Rows, true, kStages>(
        scan, ring, kItemStageBytes,
        [&](const ColumnTile& columns, int64_t, const Accumulators<Product::codes, Rows>& products) { sieve.take(columns, products); });
    sieve.end();
}

}  // namespace dqe::cuda
