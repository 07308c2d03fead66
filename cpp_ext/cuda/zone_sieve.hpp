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
template <typename Products>
class ZoneSieve {
    using L = Lane<Products>;
    static constexpr Product product = Products::kProduct;
    static constexpr int Rows = Products::kRows;

  public:
    // Each row's anchor and bounds, by all threads of the block; a barrier lies between this and the first `take`. `bounds`: kBoundsBytes
    // for each row.
    __device__ static void fill(const Scan& scan, const Selection& selection, Shared<unsigned char> bounds) {
        const Shared<float> anchor = shared_view<float>(bounds), lo = anchor + Rows, hi = lo + Rows;
        const int row = threadIdx.x;
        if (row >= Rows) return;
        const int64_t query = int64_t{blockIdx.x} * Rows + row;
        const bool real = query < scan.batch;
        anchor[row] = real ? selection.anchor[query] : __uint_as_float(0x7FC00000);  // NaN: in no zone
        lo[row] = real ? selection.lo[query] : 0.0f;
        hi[row] = real ? selection.hi[query] : 0.0f;
    }

    __device__ ZoneSieve(const Scan& scan, const Selection& selection, Shared<unsigned char> queues, Shared<unsigned char> bounds)
        : scan_(scan), selection_(selection), queue_(queues) {
        anchor_ = shared_view<float>(bounds), lo_ = anchor_ + Rows, hi_ = lo_ + Rows;
        if (product == Product::split_half)
#pragma unroll
            for (int group = 0; group < L::kGroups; ++group)
                unscale_[group] = L::query_of(group) < scan.batch ? scan.unscale[L::query_of(group)] : 0.0f;
    }

    // Afterwards the products are scores: registers hold no others beside them.
    __device__ void take(const ColumnTile& columns, Products& products) {
        if (int64_t{blockIdx.x} * Rows + Products::row_of(threadIdx.x / 32, 0) >= scan_.batch) return;  // no query of the warp's
        const int tokens = static_cast<int>(scan_.tokens);
        const unsigned stands = first_columns(columns, tokens);
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            const int row = L::row_of(group);
            const float anchor = anchor_[row], lo = lo_[row], hi = hi_[row];
            L::make_scores(scan_, columns, products, group, unscale_[group]);
            unsigned below = 0, above = 0;
#pragma unroll
            for (int place = 0; place < L::kPlaces; ++place) {
                const float delta = anchor - L::value_of(products, group, place);
                if (delta < lo) below |= 1u << place;
                if (delta > hi) above |= 1u << place;
            }
            // Below, inside and above in 10 bits each: a row has no more than 128 columns.
            unsigned zones = __popc(below & stands) | __popc(above & stands) << 20;
            // What is in neither is inside, or NaN: mostly there is none.
            if (__ballot_sync(kAllLanes, (stands & ~below & ~above) != 0)) {
                unsigned inside = 0;
#pragma unroll
                for (int place = 0; place < L::kPlaces; ++place) {
                    const float delta = anchor - L::value_of(products, group, place);
                    inside |= unsigned{delta >= lo && delta <= hi} << place;
                }
                inside &= stands;
                zones += __popc(inside) << 10;
                if (selection_.want_picks)
                    L::push(
                        queue_, inside, columns, tokens, group, [&](int place) { return L::value_of(products, group, place); },
                        [](int64_t, float) { return true; },
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

    // Places of this lane whose column is the first of an item's. Made anew each time, lest a register be kept for it.
    __device__ static unsigned first_columns(const ColumnTile& columns, int tokens) {
        not_known(tokens);
        const int left = columns.columns - L::column_of(0), rest = left & 7;
        int before = (left >> 3) * 2 + (rest < 2 ? rest : 2);  // places whose columns there are: two of each eight
        before = before < 0 ? 0 : before < L::kPlaces ? before : L::kPlaces;
        const unsigned there = before < 32 ? (1u << before) - 1 : ~0u;
        if (tokens == 1) return there;
        if (L::column_of(0) & (tokens - 1) & 7) return 0;
        return there & (tokens <= 8 ? 0x55555555 : tokens == 16 ? 0x11111111 : tokens == 32 ? 0x01010101 : tokens == 64 ? 0x00010001 : 1);
    }

    const Scan& scan_;
    const Selection& selection_;
    Queue queue_;
    Shared<float> anchor_, lo_, hi_;
    float unscale_[L::kGroups] = {};
    unsigned counts_[L::kGroups] = {};  // over the row's four lanes, of one zone each; the fourth lane counts nothing
};

}  // namespace dqe::cuda
