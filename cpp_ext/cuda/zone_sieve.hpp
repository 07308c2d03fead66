// Zone counts and pick candidates from the registers that the products left scores in, and the keys of picks.
#pragma once

#include "sieve.hpp"

namespace dqe::cuda {

// pick_key, or NaN where it is certain to be below `limit`. A softmax key s / T - log(-log u) reaches the limit only if -log u is no
// more than exp(s / T - limit), and -log u exceeds 1 - u: mostly that settles it without a logarithm. The margin is far above the
// rounding of both sides. Not inlined: it is long, and called from wherever a queue may be full.
__device__ DQE_NOINLINE inline double drawn_key(Policy policy, double temperature, uint64_t seed, float score, int64_t query, int64_t item,
                                                double limit) {
    const PickRule rule = {policy, temperature, seed};
    if (policy != Policy::softmax) return pick_key(rule, score, query, item);
    const double u = uniform(seed, static_cast<uint64_t>(query), static_cast<uint64_t>(item));
    const double exponent = score / temperature - limit;
    if (fabs(limit) < 1e9 && exponent > -80.0 && exponent < 0.0 &&
        static_cast<float>(1.0 - u) > expf(static_cast<float>(exponent)) * 1.001f)
        return __uint_as_float(0x7FC00000);
    return softmax_key(rule, score, u);
}

// Draw the key of an item inside the zone, and append what reaches the limit.
__device__ inline void pick(const Selection& selection, int64_t query, int64_t id, float score) {
    const Candidates& list = selection.picks;
    const PickRule& rule = selection.rule;
    const double limit = list.pending[query] ? list.limit_keys[query] : __uint_as_float(0x7FC00000);
    const double key = drawn_key(rule.policy, rule.temperature, rule.seed, score, selection.first_query + query, id, limit);
    if (within_limit<double>(key, id, limit, list.limit_ids[query])) append_one(list, query, key, id, score);
}

// Zone counts and pick candidates, where nothing is excluded (that would have to be looked up for every item). Keys are drawn when a warp
// has found 32 items inside, not for each tile that has one.
template <Product product, int Rows>
class ZoneSieve {
    using Products = Accumulators<product, Rows>;
    using L = Lane<Products>;

  public:
    // `bounds`: 12 bytes for each row. A barrier lies between this and `take`.
    __device__ ZoneSieve(const Scan& scan, const Selection& selection, Shared<unsigned char> queues, Shared<unsigned char> bounds)
        : scan_(scan), selection_(selection), queue_(queues) {
        anchor_ = shared_view<float>(bounds), lo_ = anchor_ + Rows, hi_ = lo_ + Rows;
        const int row = threadIdx.x;
        if (row < Rows) {
            const int64_t query = int64_t{blockIdx.x} * Rows + row;
            const bool real = query < scan.batch;
            anchor_[row] = real ? selection.anchor[query] : __uint_as_float(0x7FC00000);  // NaN: in no zone
            lo_[row] = real ? selection.lo[query] : 0.0f;
            hi_[row] = real ? selection.hi[query] : 0.0f;
        }
        if (product == Product::split_half)
#pragma unroll
            for (int group = 0; group < L::kGroups; ++group)
                unscale_[group] = L::query_of(group) < scan.batch ? scan.unscale[L::query_of(group)] : 0.0f;
    }

    __device__ void take(const ColumnTile& columns, const Products& products) {
        const int tokens = static_cast<int>(scan_.tokens);
        const bool all = columns.columns == kColumns && tokens == 1;
        unsigned whole = L::kPlaces;  // places that stand for an item
        if (!all) {
            whole = 0;
#pragma unroll
            for (int place = 0; place < L::kPlaces; ++place) whole += stands(columns, L::column_of(place), tokens);
        }
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            float score[L::kPlaces];
            L::scores_of(scan_, columns, products, group, unscale_[group], score);
            if (!all)
#pragma unroll
                for (int place = 0; place < L::kPlaces; ++place)
                    if (!stands(columns, L::column_of(place), tokens)) score[place] = __uint_as_float(0x7FC00000);
            const int row = L::row_of(group);
            const float anchor = anchor_[row], lo = lo_[row], hi = hi_[row];
            unsigned zones = 0;  // below, inside and above in 10 bits each: a row has no more than 128 columns
#pragma unroll
            for (int place = 0; place < L::kPlaces; ++place) {
                const float delta = anchor - score[place];
                if (delta < lo) zones += 1;
                if (delta > hi) zones += 1u << 20;
            }
            // What is in neither is inside, or NaN: mostly there is none.
            if (__ballot_sync(kAllLanes, (zones & 1023) + (zones >> 20) != whole)) {
                unsigned inside = 0;
#pragma unroll
                for (int place = 0; place < L::kPlaces; ++place) {
                    const float delta = anchor - score[place];
                    inside |= unsigned{delta >= lo && delta <= hi} << place;
                }
                zones += __popc(inside) << 10;
                if (selection_.want_picks)
                    L::push(
                        queue_, inside, columns, tokens, group, score, [](int64_t, float) { return true; },
                        [&](int row, int64_t id, float mine) { pick(selection_, row_query(row), id, mine); });
            }
            for (int distance = 1; distance < 4; distance *= 2) zones += __shfl_xor_sync(kAllLanes, zones, distance);
            counts_[group] += zones >> 10 * (threadIdx.x % 4) & 1023;
        }
    }

    __device__ void end() {
        queue_.flush([&](int row, int64_t id, float mine) { pick(selection_, row_query(row), id, mine); });
        if (!selection_.want_counts) return;
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            const int64_t query = L::query_of(group);
            if (threadIdx.x % 4 < 3 && query < scan_.batch)
                atomicAdd(reinterpret_cast<unsigned long long*>(selection_.counts + query * 3 + threadIdx.x % 4),
                          static_cast<unsigned long long>(counts_[group]));
        }
    }

  private:
    __device__ static int64_t row_query(int row) { return int64_t{blockIdx.x} * Rows + row; }

    // Whether a column is the first of an item's.
    __device__ static bool stands(const ColumnTile& columns, int column, int tokens) {
        return column < columns.columns && (column & (tokens - 1)) == 0;
    }

    const Scan& scan_;
    const Selection& selection_;
    Queue queue_;
    Shared<float> anchor_, lo_, hi_;
    float unscale_[L::kGroups] = {};
    unsigned counts_[L::kGroups] = {};  // over the row's four lanes, of one zone each; the fourth lane counts nothing
};

}  // namespace dqe::cuda
