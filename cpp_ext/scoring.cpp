#include "scoring.hpp"

#include <algorithm>
#include <cstring>
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
    // What prefixes leave is scattered: several rows at a time are on their way from memory where a tile leaves several.
    if (sweep.gallery.prefix && sweep.by_rows) rows = std::clamp<int64_t>(sweep.gallery.size * sweep.gallery.tokens / 128, 512, 4096);
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

// Rows whose codes are gathered at a time where rows are scored one by one: they stay in the first-level cache.
constexpr int64_t kGatheredRows = 64;
// Rows that lie together and are worth a call of their own.
constexpr int64_t kRunRows = 16;

// Up to which share of a tile its allowed items are scored alone, brought together; above, all are scored, and those of the others left
// out. Measured (docs/decisions.md): where arithmetic takes the time, less of it is always faster. Where memory does, scattered short
// rows arrive several times as slowly as the whole tile in its order.
double gathered_share(const Sweep& sweep) {
    constexpr int64_t kManyQueries = 64, kLongRead = 8192;  // bytes
    if (!sweep.by_rows) return sweep.batch >= kManyQueries ? 7.0 / 8 : 3.0 / 8;
    const bool long_reads = sweep.gallery.tokens * sweep.gallery.width * int64_t{sizeof(float)} >= kLongRead;
    return sweep.gallery.screened || sweep.gallery.half || long_reads ? 1.0 / 2 : 1.0 / 8;
}

}  // namespace

Scorer::Scorer(const Sweep& sweep, const Allowed& allowed)
    : sweep_(sweep),
      allowed_(allowed),
      kernels_(*sweep.kernels),
      tokens_(sweep.gallery.tokens),
      width_(sweep.gallery.width),
      code_width_(code_width(sweep.gallery.width)),
      padded_(sweep.batch),
      tile_items_(tile_items(sweep)),
      strip_items_(strip_items(sweep.gallery.tokens)),
      gathered_share_(gathered_share(sweep)),
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
        encode_query(sweep.queries + b * width_, width_, kernels_.short_sums && !by_rows_, codes, offsets_[at], scales_[at], norms_[at],
                     errors_[at]);
    };
    if (by_rows_)
        for (int64_t b = 0; b < sweep.batch; ++b) encode(b, codes_.data() + b * code_width_);
    if (const Prefix* prefix = sweep.gallery.prefix; prefix && by_rows_) {
        prefix_codes_.resize(static_cast<size_t>(sweep.batch * prefix->width));
        for (int64_t b = 0; b < sweep.batch; ++b)
            prefix_queries_.push_back(encode_prefix_query(sweep.queries + b * width_, width_, prefix->axes, prefix->width,
                                                          prefix_codes_.data() + b * prefix->width));
    }
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
            if (allowed_.count_of_some(id + first, count) > 0) all.push_back({&shard, first, count, id + first});
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
    const bool gathers = !allowed_.everything();
    const bool copies = sweep_.gallery.half || (gathers && !by_rows_);
    scratch.widened.resize(static_cast<size_t>(screened_ ? (sweep_.gallery.half ? width_ * tokens_ : 0) : (copies ? rows * width_ : 0)));
    if (gathers) scratch.chosen.resize(static_cast<size_t>(tile_items_));
    if (gathers && screened_) {
        scratch.codes.resize(static_cast<size_t>((by_rows_ ? std::max(tokens_, kGatheredRows) : rows) * code_width_));
        for (auto* numbers : {&scratch.scales, &scratch.errors, &scratch.norms}) numbers->resize(static_cast<size_t>(rows));
    }
    if (sweep_.gallery.lists || sweep_.gallery.prefix) {
        scratch.codes.resize(std::max(scratch.codes.size(), static_cast<size_t>(kGathered * code_width_)));
        for (auto* numbers : {&scratch.scales, &scratch.errors, &scratch.norms})
            numbers->resize(std::max<size_t>(numbers->size(), kGathered));
    }
    if (const TokenLists* lists = sweep_.gallery.lists) {
        scratch.list_bounds.assign(static_cast<size_t>((lists->count + 15) / 16 * 16), -std::numeric_limits<float>::infinity());
        scratch.reached_lists.resize(static_cast<size_t>(lists->count));
        if (tokens_ > 1) scratch.taken.assign(static_cast<size_t>((sweep_.gallery.size + 63) / 64), 0);
        return scratch;  // there are no tiles
    }
    if (screened_ && !by_rows_) scratch.reached.resize(static_cast<size_t>(rows * lanes));
    const int64_t stride = by_rows_ ? (rows + lanes - 1) / lanes * lanes : rows * lanes;
    scratch.scores.assign(static_cast<size_t>(by_rows_ ? stride * sweep_.batch : stride), -std::numeric_limits<float>::infinity());
    scratch.positions.resize(static_cast<size_t>(stride + lanes + 2 * kPrefixRows));  // blocks begin and end where they will
    scratch.best.resize(static_cast<size_t>(by_rows_ ? 0 : std::max<int64_t>(items, 1) * lanes));
    scratch.row_thresholds.resize(static_cast<size_t>(by_rows_ ? lanes : 0));
    return scratch;
}

int64_t Scorer::work() const { return sweep_.batch * allowed_.count_of_some() * tokens_ * width_ / (screened_ ? 4 : 1); }

Tile Scorer::narrowed(const Tile& tile, TileScratch& scratch) const {
    if (allowed_.everything()) return tile;
    const int64_t count = allowed_.count_of_some(tile.id, tile.count);
    if (static_cast<double>(count) > gathered_share_ * static_cast<double>(tile.count)) return tile;
    allowed_.list_some(tile.id, tile.count, scratch.chosen.data());
    return {tile.shard, tile.first, count, tile.id, scratch.chosen.data()};
}

const float* Scorer::rows_of(const Shard& shard, int64_t row, int64_t count, TileScratch& scratch) const {
    const char* data = row_at(shard, row);
    if (!sweep_.gallery.half) return reinterpret_cast<const float*>(data);
    kernels_.widen(reinterpret_cast<const uint16_t*>(data), count * width_, scratch.widened.data());
    return scratch.widened.data();
}

// What no query may return gets a bound of -infinity, in a copy of the numbers: it would reach thresholds as often as any, and be asked
// for each time.
void Scorer::hide_others(const Tile& tile, CodedRows& rows, TileScratch& scratch) const {
    const auto copy = [&](const float*& numbers, AlignedVector<float>& copied) {
        std::copy_n(numbers, rows.count, copied.begin());
        numbers = copied.data();
    };
    copy(rows.scales, scratch.scales);
    copy(rows.errors, scratch.errors);
    copy(rows.norms, scratch.norms);
    allowed_.for_each_other(tile.id, tile.count, [&](int64_t item) {
        const int64_t at = item * tokens_;
        std::fill_n(scratch.scales.begin() + at, tokens_, 0.0f);
        std::fill_n(scratch.errors.begin() + at, tokens_, -std::numeric_limits<float>::infinity());
        std::fill_n(scratch.norms.begin() + at, tokens_, 0.0f);
    });
}

const float* Scorer::rows_of(const Tile& tile, int64_t first, int64_t count, TileScratch& scratch) const {
    if (tile.together(first, count)) return rows_of(*tile.shard, (tile.first + tile.offset(first)) * tokens_, count * tokens_, scratch);
    const int64_t size = tokens_ * width_;
    float* copy = scratch.widened.data();
    for (int64_t item = first; item < first + count; ++item, copy += size) {
        const char* data = row_at(*tile.shard, (tile.first + tile.offset(item)) * tokens_);
        if (sweep_.gallery.half)
            kernels_.widen(reinterpret_cast<const uint16_t*>(data), size, copy);
        else
            std::memcpy(copy, data, static_cast<size_t>(size) * sizeof(float));
    }
    return scratch.widened.data();
}

void Scorer::score_rows(const Tile& tile, float* scores, int64_t stride, TileScratch& scratch) const {
    constexpr int64_t kAhead = 2;  // items on their way from memory
    const int batch = static_cast<int>(sweep_.batch);
    const int64_t most = !tile.chosen || (!screened_ && !sweep_.gallery.half) ? tile.count : std::max<int64_t>(1, kGatheredRows / tokens_);
    for (int64_t first = 0; first < tile.count;) {
        int64_t count = std::min(most, tile.count - first);
        if (screened_) {
            // Bounds are computed some rows at a time, so what is scattered is brought together first.
            if (tokens_ >= kRunRows && tile.chosen) count = 1;
            kernels_.bound_rows(codes_of(tile, first, count, scratch), coded_queries(0), batch, scores + first * tokens_, stride);
        } else {
            // Scores are computed row after row: what lies together needs no copy.
            if (tile.chosen)
                for (count = 1; count < most && first + count < tile.count && tile.together(first, count + 1);) ++count;
            if (tile.chosen)
                for (int64_t ahead = first + kAhead; ahead < std::min(first + count + kAhead, tile.count); ++ahead)
                    prefetch(*tile.shard, shard_row(tile, ahead * tokens_));
            kernels_.dot_rows({rows_of(tile, first, count, scratch), count * tokens_, width_}, sweep_.queries, batch,
                              scores + first * tokens_, stride);
        }
        first += count;
    }
}

CodedRows Scorer::codes_of(const Tile& tile, int64_t first, int64_t count, TileScratch& scratch) const {
    const Shard& shard = *tile.shard;
    if (tile.together(first, count)) {
        const int64_t at = (tile.first + tile.offset(first)) * tokens_;
        CodedRows rows = {
            shard.codes + at * code_width_, shard.scales + at, shard.errors + at, shard.norms + at, count * tokens_, code_width_};
        if (!tile.chosen && !allowed_.everything()) hide_others(tile, rows, scratch);
        return rows;
    }
    constexpr int64_t kAhead = 8;  // items on their way from memory
    const auto item_codes = [&](int64_t item) { return shard.codes + (tile.first + tile.chosen[item]) * tokens_ * code_width_; };
    for (int64_t i = 0; i < count; ++i) {
        if (first + i + kAhead < tile.count)
            for (int64_t at = 0; at < std::min<int64_t>(tokens_ * code_width_, 512); at += 64)
                __builtin_prefetch(item_codes(first + i + kAhead) + at);
        const int64_t from = (tile.first + tile.chosen[first + i]) * tokens_, to = i * tokens_;
        std::memcpy(scratch.codes.data() + to * code_width_, shard.codes + from * code_width_, static_cast<size_t>(tokens_ * code_width_));
        const auto copy = [&](const float* numbers, AlignedVector<float>& copied) {
            std::copy_n(numbers + from, tokens_, copied.begin() + to);
        };
        copy(shard.scales, scratch.scales);
        copy(shard.errors, scratch.errors);
        copy(shard.norms, scratch.norms);
    }
    return {scratch.codes.data(), scratch.scales.data(), scratch.errors.data(), scratch.norms.data(), count * tokens_, code_width_};
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
    constexpr int64_t kSome = 32;
    float best = -std::numeric_limits<float>::infinity(), scores[kSome];
    for (int64_t token = 0; token < tokens_; token += kSome) {
        const int64_t some = std::min(kSome, tokens_ - token);
        kernels_.dot_rows({rows_of(shard, item * tokens_ + token, some, scratch), some, width_}, sweep_.queries + b * width_, 1, scores,
                          some);
        for (int64_t i = 0; i < some; ++i) best = greater_or_nan(best, scores[i]);
    }
    return best;
}

void Scorer::prefetch(const Shard& shard, int64_t row) const {
    const char* data = row_at(shard, row);
    for (int64_t at = 0; at < std::min<int64_t>(row_bytes(), 2048); at += 64) __builtin_prefetch(data + at);
}

const Shard& Scorer::shard_of(int64_t& id) const {
    int64_t s = 0;
    for (; id >= sweep_.gallery.shards[s].count; ++s) id -= sweep_.gallery.shards[s].count;
    return sweep_.gallery.shards[s];
}

void Scorer::bound_tokens(int64_t b, const uint32_t* rows, int64_t count, TileScratch& scratch, float* bounds) const {
    for (int64_t i = 0; i < count; ++i) {
        int64_t item = rows[i] / tokens_;
        const Shard& shard = shard_of(item);
        const int64_t row = item * tokens_ + rows[i] % tokens_;
        std::memcpy(scratch.codes.data() + i * code_width_, shard.codes + row * code_width_, static_cast<size_t>(code_width_));
        scratch.scales[static_cast<size_t>(i)] = shard.scales[row];
        scratch.errors[static_cast<size_t>(i)] = shard.errors[row];
        scratch.norms[static_cast<size_t>(i)] = shard.norms[row];
    }
    kernels_.bound_rows({scratch.codes.data(), scratch.scales.data(), scratch.errors.data(), scratch.norms.data(), count, code_width_},
                        coded_queries(b), 1, bounds, count);
}

void Scorer::prefetch_codes(int64_t row) const {
    int64_t item = row / tokens_;
    const Shard& shard = shard_of(item);
    const int64_t at = item * tokens_ + row % tokens_;
    for (int64_t d = 0; d < std::min<int64_t>(code_width_, 512); d += 64) __builtin_prefetch(shard.codes + at * code_width_ + d);
    __builtin_prefetch(shard.scales + at);
    __builtin_prefetch(shard.errors + at);
    __builtin_prefetch(shard.norms + at);
}

void Scorer::prefetch_item(int64_t id) const {
    const Shard& shard = shard_of(id);
    const char* data = row_at(shard, id * tokens_);
    for (int64_t at = 0; at < std::min<int64_t>(row_bytes() * tokens_, 2048); at += 64) __builtin_prefetch(data + at);
}

float Scorer::score_item(int64_t b, int64_t id, TileScratch& scratch) const {
    const Shard& shard = shard_of(id);
    return dot_item(shard, id, b, scratch);
}

void Scorer::bound_directions(int64_t b, const TokenLists& lists, float* bounds) const {
    kernels_.bound_blocks_of_codes(lists.directions, coded_queries(b), bounds);
}

int64_t Scorer::find_lists(const TokenLists& lists, const float* products, const Reach& reach, float threshold, uint32_t* found) const {
    return kernels_.find_lists(products, lists.widest, lists.longest, lists.count, reach.norm(), reach.slack(), threshold, found);
}

float Scorer::score_of(int64_t b, int64_t id) const {
    const Shard& shard = shard_of(id);
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
