#include "zones_cpu.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace dqe::cpu {
namespace {

// Below this many scores a tile is not worth starting threads for (some 20 microseconds each).
constexpr int64_t kMinParallelWork = 1 << 16;

// Calls row(0) to row(rows - 1), on up to `threads` threads. Plain threads that end with the work: an OpenMP team would go on
// spinning for a while, and slow down the BLAS call that scores the next tile by up to two times.
template <typename Row>
void for_each_row(int64_t rows, int64_t work_per_row, int threads, const Row& row) noexcept {
    constexpr int64_t kGrain = 4;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t start = next.fetch_add(kGrain); start < rows; start = next.fetch_add(kGrain))
            for (int64_t b = start; b < std::min(rows, start + kGrain); ++b) row(b);
    };
    const int64_t wanted = threads > 0 ? threads : std::thread::hardware_concurrency();
    const int64_t useful = rows * work_per_row < kMinParallelWork ? 1 : (rows + kGrain - 1) / kGrain;
    std::vector<std::thread> helpers;
    try {
        for (int64_t t = 1; t < std::min(wanted, useful); ++t) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // The system grants no more threads; those there are do all the work.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

BestHeap<float> top_heap(const TopK& state, int64_t b) { return {state.scores + b * state.k, state.ids + b * state.k, nullptr, state.k}; }

BestHeap<double> pick_heap(const Zones& state, int64_t b) {
    const int64_t at = b * state.picks;
    return {state.pick_keys + at, state.pick_ids + at, state.pick_scores + at, state.picks};
}

}  // namespace

void update_top_k(const ScoreTile& tile, const TopK& state, int threads) noexcept {
    for_each_row(tile.queries, tile.items, threads, [&](int64_t b) {
        const float* scores = tile.scores + b * tile.items;
        BestHeap<float> heap = top_heap(state, b);
        for (int64_t i = 0; i < tile.items; ++i) heap.offer(scores[i], tile.first_item + i, 0.0f);
    });
}

void sort_top_k(const TopK& state, int64_t queries, int threads) noexcept {
    for_each_row(queries, state.k, threads, [&](int64_t b) { top_heap(state, b).sort(); });
}

void update_zones(const ScoreTile& tile, const PickRule& rule, const Zones& state, int threads) noexcept {
    for_each_row(tile.queries, tile.items, threads, [&](int64_t b) {
        const float* scores = tile.scores + b * tile.items;
        int64_t counts[3] = {0, 0, 0};
        ZoneRow row = {{state.anchor[b], state.lo[b], state.hi[b]}, state.first_query + b, counts, pick_heap(state, b)};
        for (int64_t i = 0; i < tile.items; ++i) row.offer(rule, scores[i], tile.first_item + i);
        for (int zone = 0; zone < 3; ++zone) state.counts[3 * b + zone] += counts[zone];
    });
}

void sort_picks(const Zones& state, int64_t queries, int threads) noexcept {
    for_each_row(queries, state.picks, threads, [&](int64_t b) { pick_heap(state, b).sort(); });
}

void update_ranking(const ScoreTile& tile, const Ranking& state, int threads) noexcept {
    for_each_row(tile.queries, tile.items, threads, [&](int64_t b) {
        const float* scores = tile.scores + b * tile.items;
        float* buffer = state.buffer + b * 2 * state.capacity;
        int64_t fill = state.fill[b], valid = state.valid[b];
        float threshold = state.threshold[b];
        for (int64_t i = 0; i < tile.items; ++i) {
            const float score = scores[i];
            if (std::isnan(score)) continue;
            ++valid;
            if (fill >= state.capacity && !(score > threshold)) continue;
            buffer[fill++] = score;
            if (fill == 2 * state.capacity) {  // keep the better half: constant work per score on average
                std::nth_element(buffer, buffer + state.capacity - 1, buffer + fill, std::greater<float>());
                fill = state.capacity;
                threshold = buffer[fill - 1];
            }
        }
        state.fill[b] = fill;
        state.valid[b] = valid;
        state.threshold[b] = threshold;
    });
}

void score_at_rank(const Ranking& state, int64_t queries, double quantile, float* scores, int threads) noexcept {
    for_each_row(queries, 2 * state.capacity, threads, [&](int64_t b) {
        if (state.valid[b] == 0) {
            scores[b] = std::numeric_limits<float>::quiet_NaN();
            return;
        }
        float* buffer = state.buffer + b * 2 * state.capacity;
        float* wanted = buffer + static_cast<int64_t>(std::floor(quantile * static_cast<double>(state.valid[b] - 1)));
        std::nth_element(buffer, wanted, buffer + state.fill[b], std::greater<float>());
        scores[b] = *wanted;
    });
}

}  // namespace dqe::cpu
