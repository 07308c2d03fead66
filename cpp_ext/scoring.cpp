#include "scoring.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "parallel.hpp"
#include "screen.hpp"

namespace dqe::cpu {
namespace {

constexpr int64_t kGroupRows = 12, kSmallGroupRows = 4;  // that the panel kernels take at once

// Tiles are what threads are given, and what is sampled: rows enough to amortise it, and tiles enough for every thread.
int64_t tile_items(const Sweep& sweep) {
    int64_t rows = sweep.by_rows ? 512 : 20 * kGroupRows;
    if (sweep.gallery.screened && !sweep.by_rows)
        rows = std::clamp<int64_t>(sweep.gallery.size * sweep.gallery.tokens / (8 * useful_threads(sweep.threads, INT64_MAX)), 256, 1024);
    return std::max<int64_t>(1, rows / sweep.gallery.tokens);
}

// As few items as give whole groups of rows, large or small ones; memory that is asked for a long way ahead comes more slowly.
int64_t strip_items(int64_t tokens) {
    const auto whole = [&](int64_t rows) { return rows / std::gcd(rows, tokens); };
    if (whole(kGroupRows) * tokens <= 2 * kGroupRows) return whole(kGroupRows);
    return whole(kSmallGroupRows) * tokens <= 8 * kGroupRows ? whole(kSmallGroupRows) : 1;
}

}  // namespace

Scorer::Scorer(const Sweep& sweep)
    : sweep_(sweep),
      kernels_(*sweep.kernels),
      tokens_(sweep.gallery.tokens),
      width_(sweep.gallery.width),
      code_width_(code_width(sweep.gallery.width)),
      padded_(sweep.batch),
      tile_items_(tile_items(sweep)),
      strip_items_(strip_items(sweep.gallery.tokens)),
      by_rows_(sweep.by_rows),
      screened_(sweep.gallery.screened) {
    if (!by_rows_) {
        for (int64_t first = 0; first < sweep.batch; first += panels_.back().lanes) {
            const int lanes = sweep.batch - first > kernels_.narrow ? kernels_.wide : kernels_.narrow;
            panels_.push_back({first, lanes, first});
        }
        padded_ = panels_.empty() ? 0 : panels_.back().first + panels_.back().lanes;
    }
    if (!by_rows_ && !screened_) {
        packed_.assign(static_cast<size_t>(padded_ * width_), 0.0f);
        for (const Panel& panel : panels_)
            for (int64_t lane = 0; lane < std::min<int64_t>(panel.lanes, sweep.batch - panel.first); ++lane)
                for (int64_t d = 0; d < width_; ++d)
                    packed_[static_cast<size_t>(panel.at * width_ + d * panel.lanes + lane)] =
                        sweep.queries[(panel.first + lane) * width_ + d];
    }
    if (!screened_) return;
    const auto padded = static_cast<size_t>(padded_);
    codes_.assign(padded * static_cast<size_t>(code_width_), 0);
    offsets_.assign(padded, 0);
    scales_.assign(padded, 0.0f);
    norms_.assign(padded, 0.0f);
    errors_.assign(padded, 0.0f);
    std::vector<int8_t> own(static_cast<size_t>(code_width_));
    const auto encode = [&](int64_t b, int8_t* codes) {
        const auto at = static_cast<size_t>(b);
        encode_query(sweep.queries + b * width_, width_, codes, offsets_[at], scales_[at], norms_[at], errors_[at]);
    };
    if (by_rows_)
        for (int64_t b = 0; b < sweep.batch; ++b) encode(b, codes_.data() + b * code_width_);
    for (const Panel& panel : panels_)
        for (int64_t lane = 0; lane < std::min<int64_t>(panel.lanes, sweep.batch - panel.first); ++lane) {
            encode(panel.first + lane, own.data());
            for (int64_t d = 0; d < code_width_; ++d)
                codes_[static_cast<size_t>(panel.at * code_width_ + (d / 4 * panel.lanes + lane) * 4 + d % 4)] =
                    own[static_cast<size_t>(d)];
        }
}

std::vector<Tile> Scorer::tiles() const {
    std::vector<Tile> all;
    int64_t id = 0;
    for (int64_t s = 0; s < sweep_.gallery.shard_count; ++s) {
        const Shard& shard = sweep_.gallery.shards[s];
        for (int64_t first = 0; first < shard.count;) {
            const int64_t count = std::min(tile_items_, shard.count - first);
            all.push_back({&shard, first, count, id + first});
            first += count;
        }
        id += shard.count;
    }
    return all;
}

TileScratch Scorer::scratch() const {
    TileScratch scratch;
    const int64_t items = by_rows_ || screened_ ? tile_items_ : strip_items_;
    const int64_t rows = items * tokens_, lanes = by_rows_ ? kernels_.narrow : kernels_.wide;
    scratch.widened.resize(static_cast<size_t>(sweep_.gallery.half ? (screened_ ? 1 : rows) * width_ : 0));
    if (screened_ && !by_rows_) scratch.reached.resize(static_cast<size_t>(rows * lanes));
    const int64_t stride = by_rows_ ? (rows + lanes - 1) / lanes * lanes : rows * lanes;
    scratch.scores.assign(static_cast<size_t>(by_rows_ ? stride * sweep_.batch : stride), -std::numeric_limits<float>::infinity());
    scratch.positions.resize(static_cast<size_t>(stride + lanes));
    scratch.best.resize(static_cast<size_t>(by_rows_ ? 0 : std::max<int64_t>(items, 1) * lanes));
    scratch.row_thresholds.resize(static_cast<size_t>(by_rows_ ? lanes : 0));
    return scratch;
}

int64_t Scorer::work() const { return sweep_.batch * sweep_.gallery.size * tokens_ * width_ / (screened_ ? 4 : 1); }

const float* Scorer::rows_of(const Shard& shard, int64_t row, int64_t count, TileScratch& scratch) const {
    const char* data = row_at(shard, row);
    if (!sweep_.gallery.half) return reinterpret_cast<const float*>(data);
    kernels_.widen(reinterpret_cast<const uint16_t*>(data), count * width_, scratch.widened.data());
    return scratch.widened.data();
}

CodedRows Scorer::codes_of(const Tile& tile) const {
    const int64_t at = tile.first * tokens_;
    const Shard& shard = *tile.shard;
    return {shard.codes + at * code_width_, shard.scales + at, shard.errors + at, shard.norms + at, tile.count * tokens_, code_width_};
}

CodedQueries Scorer::coded_queries(int64_t at) const {
    return {codes_.data() + at * code_width_, offsets_.data() + at, scales_.data() + at, norms_.data() + at, errors_.data() + at};
}

float Scorer::dot(const Shard& shard, int64_t row, int64_t b, TileScratch& scratch) const {
    float score;
    kernels_.dot_rows({rows_of(shard, row, 1, scratch), 1, width_}, sweep_.queries + b * width_, 1, &score, 1);
    return score;
}

float Scorer::dot_item(const Shard& shard, int64_t item, int64_t b, TileScratch& scratch) const {
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t row = item * tokens_; row < (item + 1) * tokens_; ++row) best = greater_or_nan(best, dot(shard, row, b, scratch));
    return best;
}

void Scorer::prefetch(const Shard& shard, int64_t row) const {
    const char* data = row_at(shard, row);
    for (int64_t at = 0; at < std::min<int64_t>(row_bytes(), 2048); at += 64) __builtin_prefetch(data + at);
}

float Scorer::score_of(int64_t b, int64_t id) const {
    int64_t s = 0;
    for (; id >= sweep_.gallery.shards[s].count; ++s) id -= sweep_.gallery.shards[s].count;
    const Shard& shard = sweep_.gallery.shards[s];
    TileScratch scratch;
    scratch.widened.resize(static_cast<size_t>(sweep_.gallery.half ? tokens_ * width_ : 0));
    if (by_rows_ || screened_) return dot_item(shard, id, b, scratch);
    auto panel = panels_.begin();
    while (b >= panel->first + panel->lanes) ++panel;
    std::vector<float> scores(static_cast<size_t>(tokens_ * panel->lanes));
    const Rows rows = {rows_of(shard, id * tokens_, tokens_, scratch), tokens_, width_};
    const Ahead nothing = {reinterpret_cast<const char*>(rows.data), 0, 0, 1};
    kernels_.dot_panel(rows, packed_.data() + panel->at * width_, panel->lanes, nothing, scores.data());
    kernels_.max_over_tokens(scores.data(), 1, tokens_, panel->lanes, scores.data());
    return scores[static_cast<size_t>(b - panel->first)];
}

}  // namespace dqe::cpu
