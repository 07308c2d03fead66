// One query's way through lists (lists.hpp): the most promising first, then whatever can still reach the threshold that these have raised,
// and at last the items that no list holds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "lists.hpp"
#include "scoring.hpp"

namespace dqe::cpu {

// Calls take(id, score) once at least for every allowed item whose score is not below threshold(), NaN included, which may raise it, and
// never twice for one item. Returns false, with whatever has been taken, where more than `most` tokens would have to be visited.
template <typename Threshold, typename Take>
class Walk {
  public:
    Walk(const Scorer& scorer, const Allowed& allowed, const Gallery& gallery, int64_t b, TileScratch& scratch, const Threshold& threshold,
         const Take& take)
        : scorer_(scorer),
          allowed_(allowed),
          gallery_(gallery),
          lists_(*gallery.lists),
          b_(b),
          scratch_(scratch),
          threshold_(threshold),
          take_(take),
          reach_(scorer.norm_of(b), gallery.width) {}

    // `wanted`: candidates that the threshold is made of; so many tokens, and some more, are visited before lists are ruled out.
    bool run(int64_t wanted, int64_t most) {
        scorer_.bound_directions(b_, lists_, scratch_.list_bounds.data());
        visit(lists_.rows, lists_.starts[0]);
        visit_best(wanted * gallery_.tokens);
        if (!choose(most)) return finish(false);
        for (const auto& [bound, list] : chosen_) visit_list(list);
        const int64_t end = gallery_.size * gallery_.tokens;
        uint32_t rows[Scorer::kGathered];
        for (int64_t row = lists_.covered * gallery_.tokens; row < end;) {
            int64_t count = 0;
            for (; count < Scorer::kGathered && row < end; ++row) rows[count++] = static_cast<uint32_t>(row);
            visit(rows, count);
        }
        return finish(true);
    }

    int64_t scored() const { return scored_; }

  private:
    // The lists of highest bound, until they have held so many tokens.
    void visit_best(int64_t tokens) {
        const int64_t each = std::max<int64_t>(1, lists_.covered * gallery_.tokens / lists_.count);
        const int64_t first = std::min(lists_.count, kFirstLists + 2 * tokens / each);
        std::vector<std::pair<float, uint32_t>> best;
        // By the product with the direction: it ranks lists of one width as their bounds do, and costs no root.
        const float* products = scratch_.list_bounds.data();
        const auto worse = [](const auto& one, const auto& other) { return one.first > other.first; };
        for (int64_t list = 0; list < lists_.count; ++list) {
            if (static_cast<int64_t>(best.size()) == first && !(products[list] > best.front().first)) continue;
            if (static_cast<int64_t>(best.size()) == first) {
                std::pop_heap(best.begin(), best.end(), worse);
                best.pop_back();
            }
            best.emplace_back(products[list], static_cast<uint32_t>(list));
            std::push_heap(best.begin(), best.end(), worse);
        }
        std::sort_heap(best.begin(), best.end(), worse);
        for (const auto& [product, list] : best) {
            visit_list(list);  // all of it, the nearest last, where nothing is ruled out yet
            scratch_.list_bounds[list] = kVisited;
        }
    }

    // What can still reach the threshold, the most promising first.
    bool choose(int64_t most) {
        const float threshold = threshold_();
        const float* products = scratch_.list_bounds.data();
        reach_.reached(lists_, products, threshold, scratch_.reached_lists.data());
        int64_t tokens = 0;
        for (int64_t at = 0; at < lists_.count; ++at) {
            if (!scratch_.reached_lists[at] || products[at] == kVisited) continue;
            const auto list = static_cast<uint32_t>(at);
            const int64_t start = lists_.starts[at];
            const int64_t within =
                reach_.within(products[at], lists_.cosines + start, lists_.starts[at + 1] - start, lists_.longest[at], threshold);
            if (within == 0) continue;
            tokens += within;
            if (tokens > most) return false;
            chosen_.emplace_back(reach_.bound(products[at], lists_.cosines[start], lists_.longest[at]), list);
        }
        std::sort(chosen_.begin(), chosen_.end(), [](const auto& one, const auto& other) { return one.first > other.first; });
        return true;
    }

    void visit_list(uint32_t list) {
        const int64_t from = lists_.starts[list], count = lists_.starts[list + 1] - from;
        visit(lists_.rows + from,
              reach_.within(scratch_.list_bounds[list], lists_.cosines + from, count, lists_.longest[list], threshold_()));
    }

    bool is_taken(int64_t item) const { return gallery_.tokens > 1 && (scratch_.taken[static_cast<size_t>(item / 64)] >> (item % 64) & 1); }

    void visit(const uint32_t* rows, int64_t count) {
        constexpr int64_t kAhead = 24;
        const int64_t end = gallery_.size * gallery_.tokens;
        uint32_t some[Scorer::kGathered];
        float bounds[Scorer::kGathered];
        for (int64_t i = 0; i < std::min(kAhead, count); ++i) scorer_.prefetch_codes(std::min<int64_t>(rows[i], end - 1));
        for (int64_t i = 0; i < count;) {
            int64_t found = 0;
            for (; i < count && found < Scorer::kGathered; ++i) {
                if (i + kAhead < count) scorer_.prefetch_codes(std::min<int64_t>(rows[i + kAhead], end - 1));
                const int64_t item = rows[i] / gallery_.tokens;
                if (rows[i] < end && !is_taken(item) && allowed_.allows(b_, item)) some[found++] = rows[i];
            }
            if (found > 0) scorer_.bound_tokens(b_, some, found, scratch_, bounds);
            for (int64_t f = 0; f < found; ++f) {
                const int64_t item = some[f] / gallery_.tokens;
                if (bounds[f] < threshold_() || is_taken(item)) continue;
                if (gallery_.tokens > 1) {
                    scratch_.taken[static_cast<size_t>(item / 64)] |= uint64_t{1} << (item % 64);
                    scratch_.taken_items.push_back(static_cast<uint32_t>(item));
                }
                ++scored_;
                const float score = scorer_.score_item(b_, item, scratch_);
                if (!(score < threshold_())) take_(item, score);
            }
        }
    }

    bool finish(bool whole) {
        for (const uint32_t item : scratch_.taken_items) scratch_.taken[item / 64] = 0;
        scratch_.taken_items.clear();
        return whole;
    }

    static constexpr int64_t kFirstLists = 8;
    static constexpr float kVisited = -std::numeric_limits<float>::infinity();

    const Scorer& scorer_;
    const Allowed& allowed_;
    const Gallery& gallery_;
    const TokenLists& lists_;
    const int64_t b_;
    TileScratch& scratch_;
    const Threshold& threshold_;
    const Take& take_;
    const Reach reach_;
    std::vector<std::pair<double, uint32_t>> chosen_;  // bounds and lists
    int64_t scored_ = 0;
};

}  // namespace dqe::cpu
