// One query's way through lists (lists.hpp): the most promising first, then whatever can still reach the threshold that these have raised,
// in the order of memory, and at last the items that no list holds. Tokens that a list cannot rule out are looked at by their prefixes,
// where there are some (prefix.hpp), which lie in the order of the lists, and those that are left by their codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "lists.hpp"
#include "scoring.hpp"

namespace dqe::cpu {

// Calls take(id, score) once at least for every allowed item whose score is not below threshold(), NaN included, which may raise it, and
// never twice for one item. Returns false, with whatever has been taken, where this costs more than a look at the codes of `most` tokens.
template <typename Threshold, typename Take>
class Walk {
  public:
    Walk(const Scorer& scorer, const Allowed& allowed, const Gallery& gallery, int64_t b, TileScratch& scratch, const Threshold& threshold,
         const Take& take)
        : scorer_(scorer),
          allowed_(allowed),
          gallery_(gallery),
          lists_(*gallery.lists),
          tokens_(static_cast<uint32_t>(gallery.tokens)),
          end_(static_cast<uint32_t>(gallery.size * gallery.tokens)),
          b_(b),
          scratch_(scratch),
          threshold_(threshold),
          take_(take),
          reach_(scorer.norm_of(b), gallery.width) {}
    Walk(const Walk&) = delete;
    Walk& operator=(const Walk&) = delete;
    ~Walk() {
        for (const uint32_t item : scratch_.taken_items) scratch_.taken[item / 64] = 0;
        scratch_.taken_items.clear();
    }

    bool run(int64_t most) {
        scorer_.bound_directions(b_, lists_, scratch_.list_bounds.data());
        look_at(lists_.rows, lists_.starts[0]);
        visit_best();
        int64_t count;
        if (!choose(most, count)) return false;
        const uint32_t* chosen = scratch_.reached_lists.data();
        // Each list's cosines are asked for first, then what of its prefixes they leave, and then it is visited.
        int64_t within_next[kListsAhead];
        const auto look_ahead = [&](int64_t at) {
            if (at < count) prefetch_prefixes(chosen[at], within_next[at % kListsAhead] = within(chosen[at], threshold_()));
        };
        for (int64_t at = 0; at < std::min(2 * kListsAhead, count); ++at) prefetch_cosines(chosen[at]);
        for (int64_t at = 0; at < kListsAhead; ++at) look_ahead(at);
        for (int64_t at = 0; at < count; ++at) {
            if (at + 2 * kListsAhead < count) prefetch_cosines(chosen[at + 2 * kListsAhead]);
            const uint32_t list = chosen[at];
            visit_list(list, within_next[at % kListsAhead]);
            look_ahead(at + kListsAhead);
            left_ -= lists_.starts[list + 1] - lists_.starts[list];
            if (costs_more_than(most)) return false;
        }
        decide();
        const int64_t first = lists_.covered * gallery_.tokens;
        for (int64_t row = first; row < end_; ++row) add(static_cast<uint32_t>(row));
        decide();
        return true;
    }

    int64_t scored() const { return scored_; }

  private:
    // The lists of highest bound. By the product with the direction: it ranks lists of one
    // width as their bounds do.
    void visit_best() {
        std::pair<float, uint32_t> best[kFirstLists + 1];
        int64_t count = 0;
        scorer_.for_each_above(scratch_.list_bounds, -kMost, [&](float& least, uint32_t list) {
            if (list >= lists_.count) return;  // what fills up the last vector
            int64_t at = count;
            for (const float own = scratch_.list_bounds[list]; at > 0 && own > best[at - 1].first; --at) best[at] = best[at - 1];
            best[at] = {scratch_.list_bounds[list], list};
            if (++count <= kFirstLists) return;
            count = kFirstLists;
            least = best[count - 1].first;
        });
        for (int64_t at = 0; at < count; ++at) {
            prefetch_cosines(best[at].second);
            prefetch_prefixes(best[at].second, kBlocksAhead * kPrefixRows);
        }
        int64_t begun = 0;
        if (gallery_.prefix && threshold_() == -kMost) begun = visit_first(best, count);
        for (int64_t at = 0; at < begun; ++at) scratch_.list_bounds[best[at].second] = kVisited;
        for (int64_t at = begun; at < count; ++at) {
            visit_list(best[at].second, within(best[at].second, threshold_()));
            decide();
            scratch_.list_bounds[best[at].second] = kVisited;
        }
    }

    // While there is no threshold: the tokens of highest bound of `count` lists, by their prefixes, since these raise it for all others.
    // Returns how many lists it has dealt with.
    int64_t visit_first(const std::pair<float, uint32_t>* best, int64_t count) {
        const auto greater = [](const auto& one, const auto& other) { return one.first > other.first; };
        std::pair<float, uint32_t> tokens[kFirstTokens];
        float bounds[kFirstTokens + 2 * kPrefixRows], least = -kMost;  // blocks begin and end where they will
        int64_t some = 0, lists = 0;
        for (; lists < count; ++lists) {
            const int64_t start = lists_.starts[best[lists].second], end = lists_.starts[best[lists].second + 1];
            if (some + end - start > kFirstTokens) break;
            const int64_t block = start / kPrefixRows, blocks = end > start ? prefix_blocks(end) - block : 0;
            scorer_.bound_by_prefix(b_, block, blocks, bounds);
            visited_ += end - start;
            for (int64_t at = start; at < end; ++at) {
                const float bound = bounds[at - block * kPrefixRows];
                if (!(bound < least)) tokens[some++] = {std::isnan(bound) ? kMost : bound, lists_.rows[at]};
            }
            if (least > -kMost || some < kEnoughTokens) continue;
            std::nth_element(tokens, tokens + Scorer::kGathered - 1, tokens + some, greater);
            least = tokens[Scorer::kGathered - 1].first;
        }
        const int64_t first = std::min(some, Scorer::kGathered);
        std::nth_element(tokens, tokens + first, tokens + some, greater);
        for (int64_t i = 0; i < first; ++i) add(tokens[i].second);
        decide();
        for (int64_t i = first; i < some; ++i)
            if (!(tokens[i].first < threshold_())) add(tokens[i].second);
        decide();
        if (!(threshold_() < least)) return lists;
        for (int64_t at = 0; at < lists; ++at) visit_list(best[at].second, within(best[at].second, threshold_()));  // some were left out
        return lists;
    }

    // What can still reach the threshold: `chosen` of scratch_.reached_lists.
    bool choose(int64_t most, int64_t& chosen) {
        const float threshold = threshold_();
        const float* products = scratch_.list_bounds.data();
        std::vector<uint32_t>& reached = scratch_.reached_lists;
        const int64_t found = scorer_.find_lists(lists_, products, reach_, threshold, reached.data());
        int64_t tokens = 0;
        chosen = 0;
        for (int64_t f = 0; f < found; ++f) {
            const uint32_t list = reached[f];
            const int64_t start = lists_.starts[list], count = lists_.starts[list + 1] - start;
            if (products[list] == kVisited || count == 0) continue;
            left_ += count;
            if (!gallery_.prefix && (tokens += within(list, threshold)) > most) return false;
            reached[static_cast<size_t>(chosen++)] = list;
        }
        return true;
    }

    // How many of a list's tokens, in its order, can score `threshold` or more.
    int64_t within(uint32_t list, float threshold) const {
        const uint16_t *begin = lists_.cosines + lists_.starts[list], *end = lists_.cosines + lists_.starts[list + 1];
        const int64_t last = reach_.last_code(scratch_.list_bounds[list], lists_.longest[list], threshold);
        if (last == 65535) return end - begin;
        const uint16_t* until = begin;  // most lists have few, or none: step by step, and then back
        while (until < end && *until <= last) until += std::min<int64_t>(kPrefixRows, end - until);
        return std::partition_point(until - std::min<int64_t>(kPrefixRows, until - begin), until,
                                    [&](uint16_t code) { return code <= last; }) -
               begin;
    }

    // `count`: tokens of the list, in its order, that are within reach; none behind them is.
    void visit_list(uint32_t list, int64_t count) {
        const float threshold = threshold_();
        const int64_t start = lists_.starts[list];
        if (!gallery_.prefix || threshold == -kMost) return look_at(lists_.rows + start, count);
        const int64_t end = start + count;
        visited_ += count;
        uint32_t positions[kBlocks * kPrefixRows + kPrefixRows];
        for (int64_t block = start / kPrefixRows; block * kPrefixRows < end; block += kBlocks) {
            const int64_t blocks = std::min(kBlocks, prefix_blocks(end) - block);
            const int64_t found = scorer_.find_by_prefix(b_, block, blocks, threshold, positions);
            for (int64_t f = 0; f < found; ++f) {
                const int64_t at = block * kPrefixRows + positions[f];
                if (at >= start && at < end) add(lists_.rows[at]);
            }
        }
    }

    // More than its share: a query that this helps little has spent no more than a few hundredths of a sweep by then. An item that is
    // scored counts as a look at all of its tokens: where all score alike, a sweep does that in their order.
    bool costs_more_than(int64_t most) const {
        const double size = static_cast<double>(lists_.covered * gallery_.tokens), done = 1.0 - static_cast<double>(left_) / size;
        return static_cast<double>(looked_at_ + scored_ * tokens_ + visited_ / kPrefixesPerCode) >
               static_cast<double>(most) * (done + 1.0 / 32);
    }

    void look_at(const uint32_t* rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i) add(rows[i]);
        decide();
    }

    bool is_taken(uint32_t item) const { return tokens_ > 1 && (scratch_.taken[item / 64] >> (item % 64) & 1); }

    // A token whose codes are to be looked at.
    void add(uint32_t row) {
        if (row >= end_) return;  // of no item: the lists are the caller's
        const uint32_t item = row / tokens_;
        if (is_taken(item) || !allowed_.allows(b_, item)) return;
        scorer_.prefetch_codes(row);
        some_[waiting_++] = row;
        if (waiting_ == Scorer::kGathered) decide();
    }

    // What the codes say of those that wait. The best first, since they raise the threshold for the others.
    void decide() {
        if (waiting_ == 0) return;
        float bounds[Scorer::kGathered];
        std::pair<float, uint32_t> left[Scorer::kGathered];
        scorer_.bound_tokens(b_, some_, waiting_, scratch_, bounds);
        const float threshold = threshold_();
        int64_t count = 0;
        for (int64_t i = 0; i < waiting_; ++i)
            if (!(bounds[i] < threshold)) left[count++] = {std::isnan(bounds[i]) ? kMost : bounds[i], some_[i] / tokens_};
        looked_at_ += waiting_;
        waiting_ = 0;
        std::sort(left, left + count, [](const auto& one, const auto& other) { return one.first > other.first; });
        for (int64_t i = 0; i < std::min(kItemsAhead, count); ++i) scorer_.prefetch_item(left[i].second);
        for (int64_t i = 0; i < count && !(left[i].first < threshold_()); ++i) {
            if (i + kItemsAhead < count) scorer_.prefetch_item(left[i + kItemsAhead].second);
            const uint32_t item = left[i].second;
            if (is_taken(item)) continue;
            if (tokens_ > 1) {
                scratch_.taken_items.push_back(item);
                scratch_.taken[item / 64] |= uint64_t{1} << (item % 64);
            }
            ++scored_;
            const float score = scorer_.score_item(b_, item, scratch_);
            if (!(score < threshold_())) take_(item, score);
        }
    }

    void prefetch_cosines(uint32_t list) const { __builtin_prefetch(lists_.cosines + lists_.starts[list]); }

    void prefetch_prefixes(uint32_t list, int64_t count) const {
        const int64_t block = lists_.starts[list] / kPrefixRows;
        if (gallery_.prefix && count > 0)
            scorer_.prefetch_prefixes(block, std::min(kBlocksAhead, prefix_blocks(lists_.starts[list] + count) - block));
    }

    static constexpr int64_t kFirstTokens = 2048, kEnoughTokens = 256, kFirstLists = 4, kListsAhead = 4, kItemsAhead = 2, kBlocks = 16,
                             kBlocksAhead = 4;
    // As many prefixes are read, in their order, in the time that the codes of one token take. Measured.
    static constexpr int64_t kPrefixesPerCode = 16;
    static constexpr float kMost = std::numeric_limits<float>::infinity(), kVisited = -kMost;

    const Scorer& scorer_;
    const Allowed& allowed_;
    const Gallery& gallery_;
    const TokenLists& lists_;
    const uint32_t tokens_, end_;
    const int64_t b_;
    TileScratch& scratch_;
    const Threshold& threshold_;
    const Take& take_;
    const Reach reach_;
    uint32_t some_[Scorer::kGathered];  // tokens that wait
    int64_t waiting_ = 0, looked_at_ = 0, visited_ = 0, left_ = 0, scored_ = 0;
};

}  // namespace dqe::cpu
