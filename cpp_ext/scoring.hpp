// How tiles are scored: in panels of queries or row by row, in full or from bounds first; float16 items are widened a tile
// at a time. A pair's score is the same from all entry points of one Scorer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "sweep.hpp"

namespace dqe::cpu {

// Items `first` to `first + count - 1` of a shard; `id` is the first one's position in the gallery.
struct Tile {
    const Shard* shard;
    int64_t first, count, id;
};

// Reused from tile to tile by one thread.
struct TileScratch {
    std::vector<float> scores, best, widened, row_thresholds;
    std::vector<uint32_t> positions;
};

class Scorer {
  public:
    explicit Scorer(const Sweep& sweep);

    std::vector<Tile> tiles() const;
    TileScratch scratch() const;
    // Thresholds are read in whole panels: so many of them, those behind the last query +infinity.
    int64_t padded_batch() const { return padded_; }
    // Multiply-adds of the whole sweep.
    int64_t work() const;

    float score_of(int64_t b, int64_t id) const;

    // Calls take(b, id, score) at least for every pair of the tile whose score is not below thresholds[b], NaN included;
    // `take` may raise thresholds[b]. Returns how many pairs were scored again in full.
    template <typename Take>
    int64_t score(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
        return by_rows_ ? score_by_rows(tile, thresholds, scratch, take) : score_in_panels(tile, thresholds, scratch, take);
    }

  private:
    struct Panel {
        int64_t first;  // query of lane 0
        int lanes;
        int64_t at;  // where the panel's numbers start, in queries
    };

    template <typename Take>
    int64_t score_by_rows(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const;
    template <typename Take>
    int64_t score_in_panels(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const;

    // The tile's rows in float32: in place, or widened into the scratch.
    const float* rows_of(const Tile& tile, TileScratch& scratch) const;
    CodedRows codes_of(const Tile& tile) const;
    CodedQueries coded_queries(int64_t at) const;
    // Row `row` of a shard against query b, by rows.
    float dot(const Shard& shard, int64_t row, int64_t b, TileScratch& scratch) const;
    float dot_item(const Shard& shard, int64_t item, int64_t b, TileScratch& scratch) const;
    void prefetch(const Shard& shard, int64_t row) const;

    const Sweep& sweep_;
    const TileKernels& kernels_;
    int64_t tokens_, width_, code_width_, padded_, tile_items_;
    bool by_rows_, screened_;
    std::vector<Panel> panels_;
    std::vector<float> packed_;  // panels: [panel][width][lanes]
    std::vector<int8_t> codes_;  // panels: [panel][code_width / 4][lanes][4]; rows: [query][code_width]
    std::vector<int32_t> offsets_;
    std::vector<float> scales_, norms_, errors_;
};

inline float greater_or_nan(float a, float b) { return a != a || b <= a ? a : b; }

template <typename Take>
int64_t Scorer::score_by_rows(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
    const int64_t count = tile.count * tokens_, stride = static_cast<int64_t>(scratch.scores.size()) / sweep_.batch;
    const int batch = static_cast<int>(sweep_.batch), lanes = kernels_.narrow;
    float* scores = scratch.scores.data();
    if (screened_)
        kernels_.bound_rows(codes_of(tile), coded_queries(0), batch, scores, stride);
    else
        kernels_.dot_rows({rows_of(tile, scratch), count, width_}, sweep_.queries, batch, scores, stride);

    int64_t rescored = 0;
    for (int b = 0; b < batch; ++b) {
        std::fill(scratch.row_thresholds.begin(), scratch.row_thresholds.end(), thresholds[b]);
        const float* own = scores + b * stride;
        const int64_t size = (count + lanes - 1) / lanes * lanes;
        int64_t found = kernels_.find(own, size, lanes, scratch.row_thresholds.data(), scratch.positions.data());
        const uint32_t* at = scratch.positions.data();
        while (found > 0 && at[found - 1] >= count) --found;  // padding
        if (screened_)
            for (int64_t h = 0; h < std::min<int64_t>(found, 2); ++h) prefetch(*tile.shard, tile.first * tokens_ + at[h]);
        // Rows of one item follow one another: its score is the best of those found, for the others are below the threshold.
        for (int64_t h = 0; h < found;) {
            const int64_t item = at[h] / tokens_;
            float best = -std::numeric_limits<float>::infinity();
            bool reached = false;
            for (; h < found && at[h] / tokens_ == item; ++h) {
                if (screened_ && h + 2 < found) prefetch(*tile.shard, tile.first * tokens_ + at[h + 2]);
                if (own[at[h]] < thresholds[b]) continue;  // it has risen
                best = greater_or_nan(best, screened_ ? dot(*tile.shard, tile.first * tokens_ + at[h], b, scratch) : own[at[h]]);
                reached = true;
            }
            rescored += reached && screened_;
            if (reached) take(b, tile.id + item, best);
        }
    }
    return rescored;
}

template <typename Take>
int64_t Scorer::score_in_panels(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
    const int64_t count = tile.count * tokens_;
    const float* rows = screened_ ? nullptr : rows_of(tile, scratch);
    float* scores = scratch.scores.data();
    float* best = tokens_ > 1 ? scratch.best.data() : scores;
    const uint32_t* positions = scratch.positions.data();
    int64_t rescored = 0;
    for (const Panel& panel : panels_) {
        const auto lanes = static_cast<uint32_t>(panel.lanes);
        if (screened_)
            kernels_.bound_panel(codes_of(tile), coded_queries(panel.at), panel.lanes, scores);
        else
            kernels_.dot_panel({rows, count, width_}, packed_.data() + panel.at * width_, panel.lanes, scores);
        if (tokens_ > 1) kernels_.max_over_tokens(scores, tile.count, tokens_, panel.lanes, best);
        const int64_t found =
            kernels_.find(best, tile.count * panel.lanes, panel.lanes, thresholds + panel.first, scratch.positions.data());
        for (int64_t h = 0; h < found; ++h) {
            const int64_t item = positions[h] / lanes, lane = positions[h] % lanes, b = panel.first + lane;
            if (b >= sweep_.batch) continue;
            if (!screened_) {
                take(b, tile.id + item, best[positions[h]]);
                continue;
            }
            if (tokens_ == 1 && h + 2 < found) prefetch(*tile.shard, tile.first + positions[h + 2] / lanes);
            if (best[positions[h]] < thresholds[b]) continue;  // it has risen
            // Tokens whose bound is below the threshold cannot be the best of an item that reaches it.
            float score = -std::numeric_limits<float>::infinity();
            for (int64_t row = item * tokens_; row < (item + 1) * tokens_; ++row)
                if (!(scores[row * lanes + lane] < thresholds[b]))
                    score = greater_or_nan(score, dot(*tile.shard, tile.first * tokens_ + row, b, scratch));
            ++rescored;
            take(b, tile.id + item, score);
        }
    }
    return rescored;
}

}  // namespace dqe::cpu
