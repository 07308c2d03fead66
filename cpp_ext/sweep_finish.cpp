// What came of a query: its top-k, and its zone's bounds, counts and picks.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "sweep_block.hpp"

namespace dqe::cpu {

// Anchor, bounds, counts and picks of a query, out of its field.
Status Block::resolve(QueryState& state, int64_t b, int64_t valid) const {
    const float nothing = std::numeric_limits<float>::quiet_NaN();
    float &anchor = out_.anchor[b], &lo = out_.lo[b], &hi = out_.hi[b];
    if (sweep_.zoning == Zoning::rank) {
        const auto rank_of = [&](double fraction) { return static_cast<int64_t>(std::floor(fraction * static_cast<double>(valid - 1))); };
        if (valid > 0 && rank_of(sweep_.hi) >= state.field.size()) return Status::misjudged;
        if (valid > 0 && state.field.at_rank(rank_of(sweep_.hi)) < state.field.threshold()) return Status::misjudged;
        if (sweep_.anchor_is_best) anchor = valid > 0 ? state.field.at_rank(0) : nothing;
        lo = valid > 0 ? anchor - state.field.at_rank(rank_of(sweep_.lo)) : nothing;
        hi = valid > 0 ? anchor - state.field.at_rank(rank_of(sweep_.hi)) : nothing;
    } else {
        if (valid > 0 && state.field.size() == 0) return Status::misjudged;  // an estimate above every score
        anchor = valid > 0 ? state.field.at_rank(0) : nothing;
        lo = static_cast<float>(sweep_.lo);
        hi = static_cast<float>(sweep_.hi);
    }
    if (state.field.dropped() && !(anchor - state.field.threshold() > hi)) return Status::outgrown;
    const ZoneBounds bounds = {anchor, lo, hi};
    state.field.for_each([&](float score, int64_t id) { take_in_zone(state, bounds, sweep_.query_rows[b], id, score); });
    draw(state, bounds, sweep_.query_rows[b]);
    // What is not in the field is easy, unless Δ is not a number.
    if (!std::isnan(anchor) && !std::isnan(hi)) state.counts[2] += valid - state.field.size();
    return Status::complete;
}

void Block::finish(std::vector<Worker>& workers, int64_t b) const {
    if (zones_as_it_goes())
        for (Worker& worker : workers) draw(worker.queries[static_cast<size_t>(b)], bounds_[static_cast<size_t>(b)], sweep_.query_rows[b]);
    QueryState& state = workers[0].queries[static_cast<size_t>(b)];
    std::vector<uint64_t> top, field;
    state.top.drain_to(top);
    state.field.drain_to(field);
    for (size_t t = 1; t < workers.size(); ++t) {
        QueryState& other = workers[t].queries[static_cast<size_t>(b)];
        other.top.drain_to(top);
        other.field.drain_to(field);
        state.field.join_limits(other.field);
        state.taken += other.taken;
        state.not_numbers += other.not_numbers;
        for (int zone = 0; zone < 3; ++zone) state.counts[zone] += other.counts[zone];
        for (int64_t p = 0; p < other.picks.capacity; ++p)
            if (other.picks.ids[p] >= 0) state.picks.offer(other.picks.keys[p], other.picks.ids[p], other.picks.payload[p]);
    }
    const int64_t* ids = sweep_.excluded.ids;
    const int64_t excluded = std::count_if(ids + sweep_.excluded.offsets[b], ids + sweep_.excluded.offsets[b + 1],
                                           [&](int64_t id) { return allowed_.allows(b, id); });
    const int64_t valid = allowed_.count(b) - excluded - state.not_numbers;
    const auto kept = std::min<size_t>(top.size(), static_cast<size_t>(sweep_.k));
    std::partial_sort(top.begin(), top.begin() + static_cast<int64_t>(kept), top.end(), std::greater<uint64_t>());
    for (int64_t r = 0; r < sweep_.k; ++r) {
        const bool filled = r < static_cast<int64_t>(kept);
        out_.top_scores[b * sweep_.k + r] = filled ? entry_score(top[static_cast<size_t>(r)]) : -kInfinity;
        out_.top_ids[b * sweep_.k + r] = filled ? entry_id(top[static_cast<size_t>(r)]) : -1;
    }
    const float worst = kept > 0 ? entry_score(top[kept - 1]) : -kInfinity;
    bool scattered = false;
    for (const Worker& worker : workers) scattered = scattered || worker.queries[static_cast<size_t>(b)].scattered;
    const bool judged = guesses_[static_cast<size_t>(b)].holds(static_cast<int64_t>(kept), sweep_.k, worst);
    auto& status = reinterpret_cast<Status&>(out_.status[b]);
    status = scattered ? Status::scattered : judged ? Status::complete : Status::misjudged;
    if (sweep_.zoning == Zoning::none || status != Status::complete) return;

    BestHeap<double> picks = {out_.pick_keys + b * sweep_.picks, out_.picks + b * sweep_.picks, out_.pick_scores + b * sweep_.picks,
                              sweep_.picks};
    std::fill_n(picks.keys, picks.capacity, -std::numeric_limits<double>::infinity());
    std::fill_n(picks.ids, picks.capacity, int64_t{-1});
    std::fill_n(picks.payload, picks.capacity, -kInfinity);
    if (zones_as_it_goes()) {
        // What did not reach the threshold is easy.
        state.counts[2] += valid - state.taken;
        for (int64_t p = 0; p < state.picks.capacity; ++p)
            if (state.picks.ids[p] >= 0) picks.offer(state.picks.keys[p], state.picks.ids[p], state.picks.payload[p]);
    } else {
        state.picks = picks;
        state.field.adopt(field);
        status = resolve(state, b, valid);
    }
    picks.sort();
    std::copy_n(state.counts, 3, out_.counts + 3 * b);
}

}  // namespace dqe::cpu
