// How tiles are scored: in panels of queries or row by row, in full or from bounds first; float16 items are widened as
// they are scored. A pair's score is the same from all entry points of one Scorer.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "aligned.hpp"
#include "sweep.hpp"

namespace dqe::cpu {

// `count` items of a shard: those from `first` on, or, where `chosen` is set, those so far behind `first`. `id` is the position of
// `first` in the gallery.
struct Tile {
    const Shard* shard;
    int64_t first, count, id;
    const uint32_t* chosen = nullptr;

    int64_t offset(int64_t item) const { return chosen ? chosen[item] : item; }
    // Whether `many` items from `item` on lie one behind the other.
    bool together(int64_t item, int64_t many) const { return !chosen || chosen[item + many - 1] - chosen[item] == many - 1; }
};

// Reused from tile to tile by one thread.
struct TileScratch {
    std::vector<float> list_bounds;  // of whole vectors
    std::vector<uint32_t> reached_lists;
    std::vector<uint64_t> taken;  // items whose score is known, as bits
    std::vector<uint32_t> taken_items;

    AlignedVector<float> scores, best, widened, row_thresholds;
    std::vector<uint32_t> positions;
    std::vector<Bounded> reached;
    std::vector<uint32_t> chosen;  // of the tile that is scored now
    AlignedVector<uint8_t> codes;  // of chosen items that do not lie together
    AlignedVector<float> scales, errors, norms;

    // Bytes that prefixes have cost so far beyond what a sweep of the codes would have, and of late: the latest tile, half of that before
    // it, and so on.
    int64_t prefix_balance = 0, prefix_trend = 0;
};

class Scorer {
  public:
    Scorer(const Sweep& sweep, const Allowed& allowed);

    // What has an item that some query may return.
    std::vector<Tile> tiles() const;
    // The tile, or, where that is faster, what of it some query may return; valid until the next call.
    Tile narrowed(const Tile& tile, TileScratch& scratch) const;
    TileScratch scratch() const;
    // Thresholds are read in whole panels: so many of them, those behind the last query +infinity.
    int64_t padded_batch() const { return padded_; }
    // Multiply-adds of the whole sweep.
    int64_t work() const;

    float score_of(int64_t b, int64_t id) const;

    // By rows and screened: upper bounds of the scores of tokens, each item * tokens + token of the gallery, at most kGathered; and the
    // score of an item.
    static constexpr int64_t kGathered = 64;
    void bound_tokens(int64_t b, const uint32_t* rows, int64_t count, TileScratch& scratch, float* bounds) const;
    float score_item(int64_t b, int64_t id, TileScratch& scratch) const;
    void prefetch_codes(int64_t row) const;
    void prefetch_item(int64_t id) const;
    // Upper bounds of the query's products with the directions of lists, and of its norm.
    void bound_directions(int64_t b, const TokenLists& lists, float* bounds) const;
    float norm_of(int64_t b) const { return norms_[static_cast<size_t>(b)]; }
    // Lists that may hold a token that scores `threshold` or more; and rows of some blocks of prefixes, likewise.
    int64_t find_lists(const TokenLists& lists, const float* products, const Reach& reach, float threshold, uint32_t* found) const;
    int64_t find_by_prefix(int64_t b, int64_t block, int64_t blocks, float threshold, uint32_t* positions) const;
    void bound_by_prefix(int64_t b, int64_t block, int64_t blocks, float* bounds) const;
    void prefetch_prefixes(int64_t block, int64_t blocks) const;
    // Calls visit(least, position) for the numbers that are not below `least` or NaN, which a visit may raise.
    template <typename Visit>
    void for_each_above(const std::vector<float>& numbers, float least, const Visit& visit) const;

    // Calls take(b, id, score) at least for every pair of the tile that is allowed and whose score is not below thresholds[b], NaN
    // included, and for none that is not allowed; `take` may raise thresholds[b]. Returns how many pairs were scored again in full.
    template <typename Take>
    int64_t score(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
        if (by_rows_) return score_by_rows(tile, thresholds, scratch, take);
        return screened_ ? score_from_bounds(tile, thresholds, scratch, take) : score_in_panels(tile, thresholds, scratch, take);
    }

    // Whether `estimate` says what scores are like for less than `score` costs.
    bool estimates() const { return screened_ && !by_rows_; }

    // As `score`, but with estimates of scores: the middle of what codes leave open. Every allowed pair is taken whose estimate is not
    // below the threshold.
    template <typename Take>
    void estimate(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const;

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
    template <typename Take>
    int64_t score_from_bounds(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const;
    // From the `found` pairs of a panel in scratch.reached onwards: their scores, in full.
    template <typename Take>
    int64_t score_reached(const Tile& tile, const Panel& panel, int64_t found, const float* thresholds, TileScratch& scratch,
                          const Take& take) const;
    // Scores (items, lanes) of a panel and the tile's items from `first` on, onwards: the best token of each item, and those that reach
    // the threshold.
    template <typename Take>
    void take_panel(const Tile& tile, int64_t first, int64_t items, const Panel& panel, float* scores, const float* thresholds,
                    TileScratch& scratch, const Take& take) const;

    // By rows and screened: whether prefixes are worth a look at this tile, and the positions of one query's rows that they and then the
    // codes leave, whose bounds are written to `bounds`.
    bool by_prefix(const Tile& tile, const float* thresholds, const TileScratch& scratch) const;
    int64_t find_by_prefix(const Tile& tile, int64_t b, float threshold, TileScratch& scratch, float* bounds) const;
    // The scores, or bounds, of all rows of a tile, by rows.
    void score_rows(const Tile& tile, float* scores, int64_t stride, TileScratch& scratch) const;
    // Whether pairs of a tile have to be asked for one by one.
    bool asks(const Tile& tile) const { return !allowed_.everything() && !(tile.chosen && allowed_.shared()); }
    // Row `row` of the tile, counting its items' tokens through, as a row of the shard.
    int64_t shard_row(const Tile& tile, int64_t row) const {
        return tile.chosen ? (tile.first + tile.chosen[row / tokens_]) * tokens_ + row % tokens_ : tile.first * tokens_ + row;
    }

    // The shard of an item of the gallery, whose position becomes that in the shard.
    const Shard& shard_of(int64_t& id) const;
    // `count` rows from `row` on in float32: in place, or widened into the scratch.
    const float* rows_of(const Shard& shard, int64_t row, int64_t count, TileScratch& scratch) const;
    // All rows of `count` items of a tile, from `first` on.
    const float* rows_of(const Tile& tile, int64_t first, int64_t count, TileScratch& scratch) const;
    const char* row_at(const Shard& shard, int64_t row) const { return static_cast<const char*>(shard.data) + row * row_bytes(); }
    int64_t row_bytes() const { return width_ * (sweep_.gallery.half ? 2 : 4); }
    void hide_others(const Tile& tile, CodedRows& rows, TileScratch& scratch) const;
    CodedRows codes_of(const Tile& tile, int64_t first, int64_t count, TileScratch& scratch) const;
    CodedQueries coded_queries(int64_t at) const;
    // Row `row` of a shard against query b, by rows.
    float dot(const Shard& shard, int64_t row, int64_t b, TileScratch& scratch) const;
    float dot_item(const Shard& shard, int64_t item, int64_t b, TileScratch& scratch) const;
    void prefetch(const Shard& shard, int64_t row) const;

    const Sweep& sweep_;
    const Allowed& allowed_;
    const TileKernels& kernels_;
    int64_t tokens_, width_, code_width_, padded_, tile_items_, strip_items_;
    double gathered_share_;
    bool by_rows_, screened_;
    std::vector<Panel> panels_;
    AlignedVector<float> packed_;  // panels: [panel][width][lanes]
    AlignedVector<int8_t> codes_;  // panels: [panel][code_width / 4][lanes][4]; rows: [query][code_width]
    AlignedVector<int32_t> offsets_;
    AlignedVector<float> scales_, norms_, errors_;
    std::vector<int8_t> prefix_codes_;
    std::vector<PrefixQuery> prefix_queries_;
};

inline float greater_or_nan(float a, float b) { return a != a || b <= a ? a : b; }

template <typename Visit>
void Scorer::for_each_above(const std::vector<float>& numbers, float least, const Visit& visit) const {
    constexpr int64_t kSome = 256;
    uint32_t positions[kSome + 16];
    float thresholds[16];
    for (int64_t at = 0; at < static_cast<int64_t>(numbers.size()); at += kSome) {
        const int64_t some = std::min(kSome, static_cast<int64_t>(numbers.size()) - at);
        std::fill_n(thresholds, kernels_.narrow, least);
        const int64_t found = kernels_.find(numbers.data() + at, some, kernels_.narrow, thresholds, positions);
        for (int64_t f = 0; f < found; ++f)
            if (!(numbers[static_cast<size_t>(at + positions[f])] < least)) visit(least, static_cast<uint32_t>(at + positions[f]));
    }
}

template <typename Take>
int64_t Scorer::score_by_rows(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
    const int64_t count = tile.count * tokens_, stride = static_cast<int64_t>(scratch.scores.size()) / sweep_.batch;
    const int batch = static_cast<int>(sweep_.batch), lanes = kernels_.narrow;
    float* scores = scratch.scores.data();
    const bool prefixed = by_prefix(tile, thresholds, scratch);
    if (!prefixed) score_rows(tile, scores, stride, scratch);

    const bool asked = asks(tile);
    int64_t rescored = 0;
    for (int b = 0; b < batch; ++b) {
        const float* own = scores + b * stride;
        int64_t found;
        if (prefixed) {
            found = find_by_prefix(tile, b, thresholds[b], scratch, scores + b * stride);
        } else {
            std::fill(scratch.row_thresholds.begin(), scratch.row_thresholds.end(), thresholds[b]);
            found = kernels_.find(own, (count + lanes - 1) / lanes * lanes, lanes, scratch.row_thresholds.data(), scratch.positions.data());
        }
        const uint32_t* at = scratch.positions.data();
        while (found > 0 && at[found - 1] >= count) --found;  // padding
        const auto prefetch_found = [&](int64_t h) {
            if (screened_ && h < found && (!asked || allowed_.allows(b, tile.id + tile.offset(at[h] / tokens_))))
                prefetch(*tile.shard, shard_row(tile, at[h]));
        };
        for (int64_t h = 0; h < 2; ++h) prefetch_found(h);
        // Rows of one item follow one another: its score is the best of those found, for the others are below the threshold.
        for (int64_t h = 0; h < found;) {
            const int64_t item = at[h] / tokens_, id = tile.id + tile.offset(item);
            const bool allowed = !asked || allowed_.allows(b, id);
            float best = -std::numeric_limits<float>::infinity();
            bool reached = false;
            for (; h < found && at[h] / tokens_ == item; ++h) {
                prefetch_found(h + 2);
                if (!allowed || own[at[h]] < thresholds[b]) continue;  // the threshold has risen
                best = greater_or_nan(best, screened_ ? dot(*tile.shard, shard_row(tile, at[h]), b, scratch) : own[at[h]]);
                reached = true;
            }
            rescored += reached && screened_;
            if (reached) take(b, id, best);
        }
    }
    return rescored;
}

// Some rows at a time for all panels: they stay in the first-level cache while panels come from the second, and memory has the time of
// all panels to bring the next rows.
template <typename Take>
int64_t Scorer::score_in_panels(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
    float* scores = scratch.scores.data();
    for (int64_t first = 0; first < tile.count; first += strip_items_) {
        const int64_t count = std::min(strip_items_, tile.count - first);
        const int64_t rows = count * tokens_, next = std::min(first + count, tile.count - 1);
        const Rows strip = {rows_of(tile, first, count, scratch), rows, width_};
        for (const Panel& panel : panels_) {
            const Ahead ahead = {row_at(*tile.shard, tile.chosen ? shard_row(tile, next * tokens_) : (tile.first + first) * tokens_ + rows),
                                 row_bytes(), &panel - panels_.data(), static_cast<int64_t>(panels_.size())};
            kernels_.dot_panel(strip, packed_.data() + panel.at * width_, panel.lanes, ahead, scores);
            take_panel(tile, first, count, panel, scores, thresholds, scratch, take);
        }
    }
    return 0;
}

template <typename Take>
void Scorer::estimate(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
    const CodedRows rows = codes_of(tile, 0, tile.count, scratch);
    for (const Panel& panel : panels_) {
        kernels_.estimate_panel(rows, coded_queries(panel.at), panel.lanes, scratch.scores.data());
        take_panel(tile, 0, tile.count, panel, scratch.scores.data(), thresholds, scratch, take);
    }
}

template <typename Take>
void Scorer::take_panel(const Tile& tile, int64_t first, int64_t items, const Panel& panel, float* scores, const float* thresholds,
                        TileScratch& scratch, const Take& take) const {
    float* best = tokens_ > 1 ? scratch.best.data() : scores;
    if (tokens_ > 1) kernels_.max_over_tokens(scores, items, tokens_, panel.lanes, best);
    const uint32_t* positions = scratch.positions.data();
    const int64_t found = kernels_.find(best, items * panel.lanes, panel.lanes, thresholds + panel.first, scratch.positions.data());
    const auto lanes = static_cast<uint32_t>(panel.lanes);
    const int shift = std::countr_zero(lanes);
    const bool asked = asks(tile);
    for (int64_t h = 0; h < found; ++h) {
        const int64_t b = panel.first + (positions[h] & (lanes - 1));
        if (b >= sweep_.batch) continue;  // padding
        const int64_t id = tile.id + tile.offset(first + (positions[h] >> shift));
        if (!asked || allowed_.allows(b, id)) take(b, id, best[positions[h]]);
    }
}

// A token whose bound is below the threshold cannot be the best of an item that reaches it, so an item is the best of its tokens
// that were found.
template <typename Take>
int64_t Scorer::score_from_bounds(const Tile& tile, const float* thresholds, TileScratch& scratch, const Take& take) const {
    int64_t rescored = 0;
    const CodedRows rows = codes_of(tile, 0, tile.count, scratch);
    for (const Panel& panel : panels_) {
        const int64_t found =
            kernels_.find_bounded(rows, coded_queries(panel.at), panel.lanes, thresholds + panel.first, scratch.reached.data());
        rescored += score_reached(tile, panel, found, thresholds, scratch, take);
    }
    return rescored;
}

template <typename Take>
int64_t Scorer::score_reached(const Tile& tile, const Panel& panel, int64_t found, const float* thresholds, TileScratch& scratch,
                              const Take& take) const {
    constexpr int64_t kAhead = 4;  // rows on their way from memory while one is scored
    const Bounded* reached = scratch.reached.data();
    float* best = scratch.best.data();
    const bool asked = asks(tile);
    const uint32_t last_lane = static_cast<uint32_t>(panel.lanes) - 1;
    const int shift = std::countr_zero(last_lane + 1);
    const auto row_of = [&](int64_t h) { return static_cast<int64_t>(reached[h].position >> shift); };
    const auto allowed = [&](int64_t h) {
        const int64_t b = panel.first + (reached[h].position & last_lane);
        return b < sweep_.batch && (!asked || allowed_.allows(b, tile.id + tile.offset(row_of(h) / tokens_)));
    };
    const auto prefetch_reached = [&](int64_t h) {
        if (h < found && allowed(h)) prefetch(*tile.shard, shard_row(tile, row_of(h)));
    };
    for (int64_t h = 0; h < kAhead; ++h) prefetch_reached(h);
    int64_t rescored = 0;
    for (int64_t h = 0; h < found;) {
        const int64_t item = row_of(h) / tokens_;
        uint32_t lanes = 0;  // that have a token in `best`
        for (; h < found && row_of(h) < (item + 1) * tokens_; ++h) {
            prefetch_reached(h + kAhead);
            const uint32_t lane = reached[h].position & last_lane;
            const int64_t b = panel.first + lane;
            if (!allowed(h) || reached[h].bound < thresholds[b]) continue;  // padding too; or the threshold has risen
            const float score = dot(*tile.shard, shard_row(tile, row_of(h)), b, scratch);
            best[lane] = lanes >> lane & 1 ? greater_or_nan(best[lane], score) : score;
            lanes |= 1u << lane;
        }
        rescored += std::popcount(lanes);
        for (; lanes; lanes &= lanes - 1) {
            const int lane = std::countr_zero(lanes);
            take(panel.first + lane, tile.id + tile.offset(item), best[lane]);
        }
    }
    return rescored;
}

}  // namespace dqe::cpu
