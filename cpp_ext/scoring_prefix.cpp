// The part of scoring by rows that looks at prefixes first (prefix.hpp): which rows of a tile they, and then the codes, leave; and which of
// some blocks, for lists.
#include <algorithm>
#include <limits>

#include "scoring.hpp"

namespace dqe::cpu {

bool Scorer::by_prefix(const Tile& tile, const float* thresholds, const TileScratch& scratch) const {
    const Prefix* prefix = sweep_.gallery.prefix;
    if (!prefix || tile.chosen || tile.id + tile.count > prefix->covered) return false;
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    if (std::find(thresholds, thresholds + sweep_.batch, kNone) != thresholds + sweep_.batch) return false;  // every row would pass
    // A query whom they help little has them for no more than an eighth of the time of a sweep, unless they begin to: what has been spent
    // is spent.
    return scratch.prefix_trend <= 0 || scratch.prefix_balance <= sweep_.gallery.size * tokens_ / 8 * code_width_;
}

int64_t Scorer::find_by_prefix(const Tile& tile, int64_t b, float threshold, TileScratch& scratch, float* bounds) const {
    constexpr int64_t kAhead = 16;
    const Prefix& prefix = *sweep_.gallery.prefix;
    const int64_t begin = tile.id * tokens_, end = begin + tile.count * tokens_, block = begin / kPrefixRows;
    const int64_t first = block * kPrefixRows, blocks = prefix_blocks(end) - block;
    uint32_t* positions = scratch.positions.data();
    const int64_t found = kernels_.find_prefixed(prefix.blocks + block * prefix_block_bytes(prefix.width), blocks, prefix.width,
                                                 prefix_queries_[static_cast<size_t>(b)], threshold, positions);
    const bool asked = asks(tile);
    int64_t passed = 0;
    for (int64_t f = 0; f < found; ++f) {
        const int64_t row = first + positions[f];
        if (row < begin || row >= end || (asked && !allowed_.allows(b, row / tokens_))) continue;
        positions[passed++] = static_cast<uint32_t>(row - begin);
    }
    const int64_t rows = tile.count * tokens_, swept = code_width_ + 12;
    const int64_t cost = (rows * prefix_block_bytes(prefix.width) / kPrefixRows + (passed * kGatheredCost - rows) * swept) / sweep_.batch;
    scratch.prefix_balance += cost;
    scratch.prefix_trend = scratch.prefix_trend / 2 + cost;
    int64_t left = 0;
    uint32_t some[kGathered];
    float own[kGathered];
    for (int64_t f = 0; f < std::min(kAhead, passed); ++f) prefetch_codes(begin + positions[f]);
    for (int64_t f = 0; f < passed; f += kGathered) {
        const int64_t count = std::min(kGathered, passed - f);
        for (int64_t i = 0; i < count; ++i) {
            if (f + i + kAhead < passed) prefetch_codes(begin + positions[f + i + kAhead]);
            some[i] = static_cast<uint32_t>(begin + positions[f + i]);
        }
        bound_tokens(b, some, count, scratch, own);
        for (int64_t i = 0; i < count; ++i) {
            if (own[i] < threshold) continue;
            positions[left++] = static_cast<uint32_t>(some[i] - begin);  // none behind this one has been read yet
            bounds[some[i] - begin] = own[i];
        }
    }
    return left;
}

int64_t Scorer::find_by_prefix(int64_t b, int64_t block, int64_t blocks, float threshold, uint32_t* positions) const {
    const Prefix& prefix = *sweep_.gallery.prefix;
    return kernels_.find_prefixed(prefix.blocks + block * prefix_block_bytes(prefix.width), blocks, prefix.width,
                                  prefix_queries_[static_cast<size_t>(b)], threshold, positions);
}

void Scorer::bound_by_prefix(int64_t b, int64_t block, int64_t blocks, float* bounds) const {
    const Prefix& prefix = *sweep_.gallery.prefix;
    kernels_.bound_prefixed(prefix.blocks + block * prefix_block_bytes(prefix.width), blocks, prefix.width,
                            prefix_queries_[static_cast<size_t>(b)], bounds);
}

void Scorer::prefetch_prefixes(int64_t block, int64_t blocks) const {
    const int64_t bytes = prefix_block_bytes(sweep_.gallery.prefix->width);
    const uint8_t* from = sweep_.gallery.prefix->blocks + block * bytes;
    for (int64_t at = 0; at < std::min<int64_t>(blocks * bytes, 2048); at += 64) __builtin_prefetch(from + at);
}

}  // namespace dqe::cpu
