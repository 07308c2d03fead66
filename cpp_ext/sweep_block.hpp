// What one sweep (sweep.hpp) works with: sweep.cpp goes over the gallery, sweep_finish.cpp says what came of each query.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "query_state.hpp"
#include "scoring.hpp"
#include "sweep.hpp"

namespace dqe::cpu {

class Block {
  public:
    Block(const Sweep& sweep, const Outcome& out);

    int64_t run();

  private:
    struct Worker {
        std::unique_ptr<uint64_t[]> top, field;
        std::unique_ptr<double[]> pick_keys;
        std::unique_ptr<int64_t[]> pick_ids;
        std::unique_ptr<float[]> pick_scores;
        std::vector<QueryState> queries;
        std::vector<float> thresholds;  // of whole panels
        TileScratch scratch;
        int64_t rescored = 0;
    };

    void choose_sample();
    Worker make_worker() const;
    void walk(Worker& worker, int64_t b) const;
    void scan(Worker& worker, const Tile& tile) const;
    void estimate(Worker& worker, const Tile& tile) const;
    void take(Worker& worker, int64_t b, int64_t id, float score) const;
    void take_in_zone(QueryState& state, const ZoneBounds& bounds, int64_t row, int64_t id, float score) const;
    void draw(QueryState& state, const ZoneBounds& bounds, int64_t row) const;
    void guess(std::vector<Worker>& workers, int64_t b);
    void finish(std::vector<Worker>& workers, int64_t b) const;
    Status resolve(QueryState& state, int64_t b, int64_t valid) const;
    bool is_excluded(int64_t b, int64_t id) const {
        const int64_t *from = sweep_.excluded.ids + sweep_.excluded.offsets[b], *to = sweep_.excluded.ids + sweep_.excluded.offsets[b + 1];
        return from != to && std::binary_search(from, to, id);
    }
    float threshold(const QueryState& state) const;
    bool zones_as_it_goes() const { return sweep_.zoning == Zoning::given; }
    bool zones_at_the_end() const { return sweep_.zoning == Zoning::from_best || sweep_.zoning == Zoning::rank; }

    const Sweep& sweep_;
    const Outcome& out_;
    Allowed allowed_;
    Scorer scorer_;
    std::vector<ZoneBounds> bounds_;
    std::vector<float> easy_below_;  // of given zones: all scores below are easy
    std::vector<Guess> guesses_;     // of the top-k thresholds
    int threads_;
    int64_t top_, field_, picks_;  // what each thread keeps of a query
    std::vector<Tile> tiles_;      // those of the sample first
    int64_t sampled_tiles_ = 0;    // how many these are
    // By query, or one for all: ranks in the sample to guess thresholds from; 0: none is guessed.
    struct SampledRanks {
        int64_t top = 0, field = 0;
    };
    std::vector<SampledRanks> sampled_{{}};
    SampledRanks most_sampled_;

    const SampledRanks& sampled(int64_t b) const { return sampled_[sampled_.size() > 1 ? static_cast<size_t>(b) : 0]; }
};

}  // namespace dqe::cpu
