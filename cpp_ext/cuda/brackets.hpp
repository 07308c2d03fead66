// Scores at ranks, from kept scores: a sample says between which scores a rank must nearly always lie, one pass counts what lies before and
// at either end and collects what lies between, and the rank is selected among these. Ties longer than a bracket are at one of its ends.
// Where a bracket missed, or holds too much, the histograms of a radix selection decide (three passes).
#pragma once

#include "kept.hpp"
#include "query_kernels.hpp"

namespace dqe::cuda {

constexpr int64_t kSampledScores = kSharedSort;
constexpr size_t kBracketBytes = kSharedSort * sizeof(uint32_t) + 128;
constexpr float kBracketDeviations = 4.5f;   // of the place of a rank in the sample: two queries in 100,000 miss
constexpr uint32_t kLastImage = 0xFFFFFFFE;  // behind those of all scores
constexpr uint32_t kNoImage = 0xFFFFFFFF;    // of NaN

struct Brackets {
    uint32_t* ends;              // (batch, 2, 2): the first and the last image (descending_image) of each rank's bracket
    unsigned long long* counts;  // (batch, 2, 4): scores before it, at its first image, inside, and at its last
    unsigned long long* totals;  // (batch): scores that are not NaN
    uint32_t* images;            // (batch, 2, capacity): of the scores inside
    int64_t capacity;

    static constexpr int64_t capacity_of(int64_t size) {
        const int64_t sample = size < kSampledScores ? size : kSampledScores;
        return size / 8 > sample ? size / 8 : sample;
    }
};

// Where a slot of the sample looks: at a place within its own stretch of the items, which no period of theirs meets.
__host__ __device__ inline int64_t sampled_place(int64_t slot, int64_t slots, int64_t size) {
    const uint32_t scrambled = static_cast<uint32_t>(slot) * 2654435761u;
    return (slot * size + scrambled % size) / slots;
}

// A block for each query. Empties the counts.
__global__ __launch_bounds__(kSortThreads) void sample_brackets(KeptItems items, Brackets to, double lo, double hi) {
    const int64_t query = blockIdx.x, slots = items.size < kSampledScores ? items.size : kSampledScores;
    const Shared<uint32_t> images = shared_view<uint32_t>(shared_memory());
    const Shared<unsigned> real = shared_view<unsigned>(shared_memory() + kSharedSort * sizeof(uint32_t));
    const int thread = threadIdx.x;
    if (thread == 0) real[0] = 0;
    int64_t size = 1;
    while (size < slots) size *= 2;
    __syncthreads();
    for (int64_t slot = thread; slot < size; slot += kSortThreads) {
        uint32_t image = kNoImage;
        if (slot < slots) {
            const float score = items.scores[query * items.pitch + sampled_place(slot, slots, items.size)];
            if (score == score) image = descending_image(score), shared_add(real, 0, 1);
        }
        images[slot] = image;
    }
    for (int64_t width = 2; width <= size; width *= 2)
        for (int64_t stride = width / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int64_t i = thread; i < size / 2; i += kSortThreads) {
                const int64_t a = 2 * i - (i & (stride - 1)), b = a + stride;
                const uint32_t image_a = images[a], image_b = images[b];
                if ((image_a > image_b) == ((a & width) == 0)) images[a] = image_b, images[b] = image_a;
            }
        }
    __syncthreads();
    if (thread >= 2) return;
    const unsigned seen = real[0];
    const float rank = static_cast<float>(thread ? hi : lo), place = rank * (seen ? seen - 1 : 0);
    const float margin = kBracketDeviations * sqrtf(seen * rank * (1.0f - rank)) + 8.0f;
    const int64_t at = query * 2 + thread, first = static_cast<int64_t>(floorf(place - margin));
    const int64_t last = static_cast<int64_t>(ceilf(place + margin));
    to.ends[at * 2] = first > 0 ? static_cast<uint32_t>(images[first]) : 0;
    to.ends[at * 2 + 1] = last < seen ? static_cast<uint32_t>(images[last]) : kLastImage;
    for (int part = 0; part < 4; ++part) to.counts[at * 4 + part] = 0;
    if (thread == 0) to.totals[query] = 0;
}

__device__ inline unsigned long long warp_sum(unsigned long long mine) {
    for (int distance = 16; distance > 0; distance /= 2) mine += __shfl_xor_sync(kAllLanes, mine, distance);
    return mine;
}

// As any pass over kept scores.
__global__ __launch_bounds__(kThreads) void collect_brackets(KeptItems items, Brackets to) {
    const int64_t query = blockIdx.x;
    const int lane = threadIdx.x % 32;
    uint32_t first[2], last[2];
    for (int rank = 0; rank < 2; ++rank) first[rank] = to.ends[(query * 2 + rank) * 2], last[rank] = to.ends[(query * 2 + rank) * 2 + 1];
    unsigned total = 0, before[2] = {}, at_first[2] = {}, at_last[2] = {};
    each_kept(items, [&](int64_t, const float (&score)[4]) {
        uint32_t image[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            image[j] = score[j] == score[j] ? descending_image(score[j]) : kNoImage;
            total += image[j] != kNoImage;
        }
#pragma unroll
        for (int rank = 0; rank < 2; ++rank) {
            unsigned mine = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                before[rank] += image[j] < first[rank];
                at_first[rank] += image[j] == first[rank];
                at_last[rank] += image[j] == last[rank];
                mine += image[j] > first[rank] && image[j] < last[rank];
            }
            if (__ballot_sync(kAllLanes, mine != 0) == 0) continue;
            unsigned ahead = 0, all = 0;
            for (int bit = 0; bit < 3; ++bit) {
                const unsigned lanes = __ballot_sync(kAllLanes, mine >> bit & 1);
                ahead += __popc(lanes & ((1u << lane) - 1)) << bit, all += __popc(lanes) << bit;
            }
            const int64_t at = query * 2 + rank;
            unsigned long long place = 0;
            if (lane == 0) place = atomicAdd(&to.counts[at * 4 + 2], static_cast<unsigned long long>(all));
            place = __shfl_sync(kAllLanes, place, 0) + ahead;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (image[j] > first[rank] && image[j] < last[rank]) {
                    if (place < static_cast<unsigned long long>(to.capacity)) to.images[at * to.capacity + place] = image[j];
                    ++place;
                }
        }
    });
    const unsigned long long scores = warp_sum(total);
    if (lane == 0 && scores) atomicAdd(&to.totals[query], scores);
    for (int rank = 0; rank < 2; ++rank) {
        const unsigned long long sums[3] = {warp_sum(before[rank]), warp_sum(at_first[rank]), warp_sum(at_last[rank])};
        for (int part = 0; part < 3; ++part)
            if (lane == 0 && sums[part]) atomicAdd(&to.counts[(query * 2 + rank) * 4 + (part == 2 ? 3 : part)], sums[part]);
    }
}

// A block for each query and rank.
__global__ __launch_bounds__(kSortThreads) void select_in_brackets(Brackets from, RankState state, volatile unsigned* missed) {
    const int64_t at = int64_t{blockIdx.x} * 2 + blockIdx.y;
    const int thread = threadIdx.x, lane = thread % 32;
    const int64_t total = static_cast<int64_t>(from.totals[blockIdx.x]);
    if (total == 0) {
        if (thread == 0) state.scores[at] = __uint_as_float(0x7FC00000);
        return;
    }
    const auto count = [&](int part) { return static_cast<int64_t>(from.counts[at * 4 + part]); };
    const int64_t inside = count(2);
    int64_t left = static_cast<int64_t>(floor((blockIdx.y ? state.hi : state.lo) * static_cast<double>(total - 1))) - count(0);
    const uint32_t first = from.ends[at * 2], last = from.ends[at * 2 + 1];
    const bool at_first = left >= 0 && left < count(1);
    left -= count(1);
    const bool within = !at_first && left >= 0 && left < inside, at_last = first != last && left >= inside && left - inside < count(3);
    if (!(within && inside <= from.capacity)) {
        if (thread != 0) return;
        if (at_first || at_last)
            state.scores[at] = score_of_image(at_first ? first : last);
        else
            *missed = 1;
        return;
    }
    const Shared<unsigned> bins = shared_view<unsigned>(shared_memory()), found = bins + kBins;
    uint32_t prefix = 0;
    for (int level = 0; level < kLevels; ++level) {
        const int shift = level_shift(level), bits = level == kLevels - 1 ? 10 : 11;
        for (int bin = thread; bin < kBins; bin += kSortThreads) bins[bin] = 0;
        __syncthreads();
        for (int64_t i = thread; i < inside; i += kSortThreads) {
            const uint32_t image = from.images[at * from.capacity + i];
            if (level == 0 || image >> level_shift(level - 1) == prefix) shared_add(bins, image >> shift & ((1u << bits) - 1), 1);
        }
        __syncthreads();
        if (thread < 32) {
            int64_t mine = 0, below = 0;
            for (int i = 0; i < kBins / 32; ++i) mine += static_cast<unsigned>(bins[lane * (kBins / 32) + i]);
            for (int other = 0; other < 32; ++other) {
                const int64_t theirs = __shfl_sync(kAllLanes, mine, other);
                if (other < lane) below += theirs;
            }
            if (left >= below && left < below + mine) {  // one lane
                int bin = lane * (kBins / 32);
                int64_t rest = left - below;
                while (rest >= static_cast<int64_t>(static_cast<unsigned>(bins[bin]))) rest -= static_cast<unsigned>(bins[bin++]);
                found[0] = static_cast<unsigned>(bin), found[1] = static_cast<unsigned>(rest);
            }
        }
        __syncthreads();
        prefix = prefix << bits | static_cast<unsigned>(found[0]);
        left = static_cast<unsigned>(found[1]);
        __syncthreads();  // before the bins are emptied
    }
    if (thread == 0) state.scores[at] = score_of_image(prefix);
}

}  // namespace dqe::cuda
