#include "sweep.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.hpp"
#include "sweep_block.hpp"
#include "walk.hpp"

namespace dqe::cpu {
namespace {

// Tiles go to whichever thread is free, so each sees about its share of a query's field. A share that is too small after all
// shows at the end, like a field that is; without a sample, which is the second try, each thread may hold the whole.
int64_t field_share(const Sweep& sweep, int64_t candidates, int threads) {
    const int64_t field = std::min(sweep.field, candidates);
    if (threads == 1 || (sweep.zoning == Zoning::rank && sweep.sample == 0)) return field;
    return std::min(field, 3 * field / (2 * threads) + 64);
}

}  // namespace

Block::Block(const Sweep& sweep, const Outcome& out)
    : sweep_(sweep),
      out_(out),
      allowed_(sweep.allowed, sweep.batch, sweep.gallery.size),
      scorer_(sweep, allowed_),
      bounds_(static_cast<size_t>(sweep.batch)),
      easy_below_(static_cast<size_t>(sweep.batch), -kInfinity),
      guesses_(static_cast<size_t>(sweep.batch)),
      threads_(sweep.gallery.lists ? static_cast<int>(std::clamp<int64_t>(sweep.batch, 1, sweep.threads))
                                   : useful_threads(sweep.threads, scorer_.work())),
      top_(std::min(sweep.k, allowed_.most())),
      field_(zones_at_the_end() ? field_share(sweep, allowed_.most(), sweep.gallery.lists ? 1 : threads_) : 0),
      picks_(zones_as_it_goes() ? std::min(sweep.picks, allowed_.most()) : 0),
      tiles_(sweep.gallery.lists ? std::vector<Tile>() : scorer_.tiles()) {
    if (sweep.sample > 0 && !tiles_.empty()) choose_sample();
}

// Whole tiles, and so perhaps more items than were asked for: ranks are those in what is really sampled. Where that is more than a
// quarter of the candidates, it would save nothing.
void Block::choose_sample() {
    const int64_t size = allowed_.count_of_some();
    const double items_per_tile = static_cast<double>(size) / static_cast<double>(tiles_.size());
    const auto wanted = static_cast<size_t>(std::ceil(static_cast<double>(sweep_.sample) / items_per_tile));
    const size_t stride = std::max<size_t>(1, tiles_.size() / wanted);
    std::vector<Tile> first, rest;
    for (size_t i = 0; i < tiles_.size(); ++i) (i % stride == stride / 2 ? first : rest).push_back(tiles_[i]);
    sampled_.resize(allowed_.shared() ? 1 : static_cast<size_t>(sweep_.batch));
    for (size_t b = 0; b < sampled_.size(); ++b) {
        const int64_t own = allowed_.count(static_cast<int64_t>(b));
        int64_t items = 0;
        for (const Tile& tile : first) items += allowed_.count(static_cast<int64_t>(b), tile.id, tile.count);
        if (4 * items > own) continue;
        sampled_[b].top = sampled_rank(std::min(top_, own), items, own);
        sampled_[b].field = zones_at_the_end() ? sampled_rank(std::min(sweep_.field, own), items, own) : 0;
        most_sampled_ = {std::max(most_sampled_.top, sampled_[b].top), std::max(most_sampled_.field, sampled_[b].field)};
    }
    if (!most_sampled_.top && !most_sampled_.field) return;
    sampled_tiles_ = static_cast<int64_t>(first.size());
    tiles_ = std::move(first);  // stable, so that ids still ascend within each part
    tiles_.insert(tiles_.end(), rest.begin(), rest.end());
}

float Block::threshold(const QueryState& state) const {
    float lowest = kInfinity;
    if (sweep_.k > 0) lowest = state.top.threshold();
    if (zones_as_it_goes()) lowest = std::min(lowest, state.easy_below);
    if (zones_at_the_end()) lowest = std::min(lowest, std::max(state.field.threshold(), state.easy_below));
    return lowest;
}

Block::Worker Block::make_worker() const {
    const auto batch = static_cast<size_t>(sweep_.batch);
    const int64_t top_room = Reservoir::room(std::max(top_, most_sampled_.top)),
                  field_room = Reservoir::room(std::max(field_, most_sampled_.field));
    const auto picks = static_cast<size_t>(picks_);
    Worker worker;
    // Default-initialised: pages that are never written take no memory.
    worker.top.reset(new uint64_t[batch * static_cast<size_t>(top_room)]);
    worker.field.reset(new uint64_t[batch * static_cast<size_t>(field_room)]);
    worker.pick_keys.reset(new double[batch * picks]);
    worker.pick_ids.reset(new int64_t[batch * picks]);
    worker.pick_scores.reset(new float[batch * picks]);
    std::fill_n(worker.pick_keys.get(), batch * picks, -std::numeric_limits<double>::infinity());
    std::fill_n(worker.pick_ids.get(), batch * picks, int64_t{-1});
    worker.thresholds.assign(static_cast<size_t>(scorer_.padded_batch()), kInfinity);
    worker.scratch = scorer_.scratch();
    worker.queries.resize(batch);
    for (size_t b = 0; b < batch; ++b) {
        QueryState& state = worker.queries[b];
        const SampledRanks& ranks = sampled(static_cast<int64_t>(b));
        state.top =
            Reservoir(worker.top.get() + b * static_cast<size_t>(top_room), ranks.top ? ranks.top : top_, sweep_.gallery.lists != nullptr);
        state.field = Reservoir(worker.field.get() + b * static_cast<size_t>(field_room), ranks.field ? ranks.field : field_);
        state.picks = {worker.pick_keys.get() + b * picks, worker.pick_ids.get() + b * picks, worker.pick_scores.get() + b * picks,
                       static_cast<int64_t>(picks)};
        state.unreachable = std::numeric_limits<double>::infinity();
        state.best = -kInfinity;
        state.easy_below = easy_below_[b];
        worker.thresholds[b] = threshold(state);
    }
    return worker;
}

// One candidate of a query whose bounds are known; `draw` must follow the last.
void Block::take_in_zone(QueryState& state, const ZoneBounds& bounds, int64_t row, int64_t id, float score) const {
    const float delta = bounds.anchor - score;
    state.counts[0] += delta < bounds.lo;
    state.counts[2] += delta > bounds.hi;
    if (!(delta >= bounds.lo && delta <= bounds.hi)) return;
    ++state.counts[1];
    if (state.picks.capacity == 0) return;
    if (sweep_.rule.policy == Policy::hardest) return state.picks.offer(score, id, score);
    state.drawn_ids[state.drawn] = static_cast<uint32_t>(id);
    state.drawn_scores[state.drawn] = score;
    if (++state.drawn == kUniforms) draw(state, bounds, row);
}

// Random numbers for those that wait, several at once, and their offers.
void Block::draw(QueryState& state, const ZoneBounds& bounds, int64_t row) const {
    double u[kUniforms];
    sweep_.kernels->uniforms(sweep_.rule.seed, static_cast<uint64_t>(row), state.drawn_ids, state.drawn, u);
    for (int i = 0; i < state.drawn; ++i) {
        const float score = state.drawn_scores[i];
        if (sweep_.rule.policy == Policy::uniform) {
            state.picks.offer(u[i], state.drawn_ids[i], score);
        } else if (!(1.0 - u[i] > state.unreachable)) {
            const double worst = state.picks.keys[0];
            state.picks.offer(softmax_key(sweep_.rule, score, u[i]), state.drawn_ids[i], score);
            if (state.picks.keys[0] > worst) state.unreachable = unreachable_above(bounds, sweep_.rule.temperature, state.picks.keys[0]);
        }
    }
    state.drawn = 0;
}

void Block::take(Worker& worker, int64_t b, int64_t id, float score) const {
    if (is_excluded(b, id)) return;
    QueryState& state = worker.queries[static_cast<size_t>(b)];
    if (std::isnan(score)) {
        ++state.not_numbers;
        return;
    }
    ++state.taken;
    bool risen = sweep_.k > 0 && state.top.offer(score, id);
    if (zones_as_it_goes()) take_in_zone(state, bounds_[static_cast<size_t>(b)], sweep_.query_rows[b], id, score);
    if (zones_at_the_end() && !(score < state.easy_below)) {
        risen |= state.field.offer(score, id);
        if (sweep_.zoning == Zoning::from_best && score > state.best) {
            state.best = score;
            // A negative hi makes the best itself easy; it is still needed.
            state.easy_below = std::min(score, easy_threshold(score, static_cast<float>(sweep_.hi)));
            risen = true;
        }
    }
    if (risen) worker.thresholds[static_cast<size_t>(b)] = threshold(state);
}

void Block::walk(Worker& worker, int64_t b) const {
    const float& threshold_now = worker.thresholds[static_cast<size_t>(b)];
    const auto threshold = [&] { return threshold_now; };
    const auto take_one = [&](int64_t id, float score) { take(worker, b, id, score); };
    Walk way(scorer_, allowed_, sweep_.gallery, b, worker.scratch, threshold, take_one);
    worker.queries[static_cast<size_t>(b)].scattered = !way.run(sweep_.most_listed);
    worker.rescored += way.scored();
}

void Block::scan(Worker& worker, const Tile& whole) const {
    const Tile tile = scorer_.narrowed(whole, worker.scratch);
    worker.rescored += scorer_.score(tile, worker.thresholds.data(), worker.scratch, [&](int64_t b, int64_t id, float score) {
        if (!(score < worker.thresholds[static_cast<size_t>(b)])) take(worker, b, id, score);
    });
}

void Block::estimate(Worker& worker, const Tile& whole) const {
    const Tile tile = scorer_.narrowed(whole, worker.scratch);
    scorer_.estimate(tile, worker.thresholds.data(), worker.scratch, [&](int64_t b, int64_t id, float score) {
        if (std::isnan(score) || is_excluded(b, id)) return;
        QueryState& state = worker.queries[static_cast<size_t>(b)];
        const SampledRanks& ranks = sampled(b);
        if (ranks.top) state.top.offer(score, id);
        if (ranks.field) state.field.offer(score, id);
        const float top = ranks.top ? state.top.threshold() : kInfinity;
        worker.thresholds[static_cast<size_t>(b)] = ranks.field ? std::min(top, state.field.threshold()) : top;
    });
}

// Thresholds for the rest of the gallery, from what the sample held.
void Block::guess(std::vector<Worker>& workers, int64_t b) {
    const auto at = static_cast<size_t>(b);
    const auto restart = [&](Reservoir QueryState::* part, int64_t capacity, int64_t rank) {
        std::vector<uint64_t> all;
        Guess guess;
        for (Worker& worker : workers) {
            Reservoir& kept = worker.queries[at].*part;
            kept.drain_to(all);
            if (scorer_.estimates()) kept.clear();
            guess.dropped = guess.dropped || kept.dropped();
        }
        if (rank > 0 && static_cast<int64_t>(all.size()) >= rank) {
            std::nth_element(all.begin(), all.begin() + rank - 1, all.end(), std::greater<uint64_t>());
            guess.threshold = entry_score(all[static_cast<size_t>(rank - 1)]);
        }
        for (Worker& worker : workers) (worker.queries[at].*part).restart(capacity, guess.threshold);
        return guess;
    };
    guesses_[at] = restart(&QueryState::top, top_, sampled(b).top);
    restart(&QueryState::field, field_, sampled(b).field);
    float easy_below = -kInfinity;
    for (const Worker& worker : workers) easy_below = std::max(easy_below, worker.queries[at].easy_below);
    for (Worker& worker : workers) {
        worker.queries[at].easy_below = easy_below;
        worker.thresholds[at] = threshold(worker.queries[at]);
    }
}

int64_t Block::run() {
    if (sweep_.batch == 0) return 0;
    // Some together: each takes microseconds, and few are not worth a second thread.
    constexpr int64_t kSome = 64;
    const auto for_each_query = [&](const auto& work) {
        for_each_part((sweep_.batch + kSome - 1) / kSome, threads_, [&](int, int64_t part) {
            for (int64_t b = part * kSome; b < std::min(sweep_.batch, (part + 1) * kSome); ++b) work(b);
        });
    };
    if (sweep_.anchor_ids) for_each_query([&](int64_t b) { out_.anchor[b] = scorer_.score_of(b, sweep_.anchor_ids[b]); });
    if (zones_as_it_goes())
        for_each_query([&](int64_t b) {
            bounds_[static_cast<size_t>(b)] = {out_.anchor[b], out_.lo[b], out_.hi[b]};
            easy_below_[static_cast<size_t>(b)] = easy_threshold(out_.anchor[b], out_.hi[b]);
        });

    std::vector<Worker> workers(static_cast<size_t>(threads_));
    for_each_part(threads_, sweep_.batch < kSome ? 1 : threads_, [&](int, int64_t t) { workers[static_cast<size_t>(t)] = make_worker(); });
    if (sweep_.gallery.lists) {
        for_each_part(sweep_.batch, threads_, [&](int t, int64_t b) { walk(workers[static_cast<size_t>(t)], b); });
    }
    // As many threads as the part is worth: a sample for one query is done before a second thread has woken up.
    const auto for_each_tile = [&](int64_t from, int64_t to, const auto& work) {
        const int64_t share = scorer_.work() / std::max<int64_t>(1, static_cast<int64_t>(tiles_.size())) * (to - from);
        for_each_part(to - from, std::min(threads_, useful_threads(threads_, share)),
                      [&](int t, int64_t i) { work(workers[static_cast<size_t>(t)], tiles_[static_cast<size_t>(from + i)]); });
    };
    if (sampled_tiles_ > 0) {
        if (scorer_.estimates())
            for_each_tile(0, sampled_tiles_, [&](Worker& worker, const Tile& tile) { estimate(worker, tile); });
        else
            for_each_tile(0, sampled_tiles_, [&](Worker& worker, const Tile& tile) { scan(worker, tile); });
        for_each_query([&](int64_t b) { guess(workers, b); });
    }
    for_each_tile(scorer_.estimates() ? 0 : sampled_tiles_, static_cast<int64_t>(tiles_.size()),
                  [&](Worker& worker, const Tile& tile) { scan(worker, tile); });
    for_each_query([&](int64_t b) { finish(workers, b); });
    int64_t rescored = 0;
    for (const Worker& worker : workers) rescored += worker.rescored;
    return rescored;
}

int64_t run(const Sweep& sweep, const Outcome& out) { return Block(sweep, out).run(); }

}  // namespace dqe::cpu
