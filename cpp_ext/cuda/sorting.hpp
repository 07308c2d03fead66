// Candidate lists by one block each: what can be among the best is brought into shared memory and sorted there.
#pragma once

#include "../zone_select.hpp"
#include "ptx.hpp"
#include "scan.hpp"

namespace dqe::cuda {

constexpr int kSortThreads = 1024;
constexpr int kSharedSort = 4096;  // longest list sorted in shared memory; 80 KiB
constexpr size_t kSharedSortBytes = kSharedSort * (sizeof(double) + sizeof(int64_t) + sizeof(float)) + 1024;
constexpr int kNarrowBins = kSortThreads;
static_assert(kSortThreads == 32 * 32);  // a warp adds up what 32 warps have
constexpr int kNarrowFrom = 512;         // shorter lists are sorted as they are

// One step of a bitonic network over `size` entries, a power of two: pairs `stride` apart, runs of `width` that alternate between best
// first and best last. For pointers into shared or device memory; `base`: where the entries lie in the whole list. Steps follow each other
// as in sort_entries: up to a stride of 32 each warp keeps to 64 entries of its own, and waits for nobody else.
template <typename Keys, typename Ids, typename Scores>
__device__ void sort_step(Keys keys, Ids ids, Scores scores, int64_t size, int64_t width, int64_t stride, int64_t base) {
    if (width == 2 || stride > 32 || (stride == 32 && width > 64))
        __syncthreads();
    else
        __syncwarp();
    for (int64_t i = threadIdx.x; i < size / 2; i += kSortThreads) {
        const int64_t a = 2 * i - (i & (stride - 1)), b = a + stride;
        const double key_a = keys[a], key_b = keys[b];
        const int64_t id_a = ids[a], id_b = ids[b];
        const bool best_first = ((base + a) & width) == 0;
        const bool swapped = best_first ? BestHeap<double>::ranks_before(key_b, id_b, key_a, id_a)
                                        : BestHeap<double>::ranks_before(key_a, id_a, key_b, id_b);
        if (!swapped) continue;
        const float score_a = scores[a], score_b = scores[b];
        keys[a] = key_b, keys[b] = key_a;
        ids[a] = id_b, ids[b] = id_a;
        scores[a] = score_b, scores[b] = score_a;
    }
}

// Best first; or, for a part of a longer list, in the order that its `base` asks for.
template <typename Keys, typename Ids, typename Scores>
__device__ void sort_entries(Keys keys, Ids ids, Scores scores, int64_t size, int64_t base) {
    for (int64_t width = 2; width <= size; width *= 2)
        for (int64_t stride = width / 2; stride > 0; stride /= 2) sort_step(keys, ids, scores, size, width, stride, base);
    __syncthreads();
}

// More entries than shared memory takes: only steps whose stride reaches beyond a part that fits go through device memory.
__device__ inline void sort_long(double* keys, int64_t* ids, float* scores, int64_t size, Shared<double> k, Shared<int64_t> i,
                                 Shared<float> s) {
    const auto in_parts = [&](const auto& sort) {
        for (int64_t base = 0; base < size; base += kSharedSort) {
            for (int at = threadIdx.x; at < kSharedSort; at += kSortThreads)
                k[at] = keys[base + at], i[at] = ids[base + at], s[at] = scores[base + at];
            sort(base);
            __syncthreads();
            for (int at = threadIdx.x; at < kSharedSort; at += kSortThreads)
                keys[base + at] = k[at], ids[base + at] = i[at], scores[base + at] = s[at];
        }
    };
    in_parts([&](int64_t base) { sort_entries(k, i, s, kSharedSort, base); });
    for (int64_t width = 2 * kSharedSort; width <= size; width *= 2) {
        for (int64_t stride = width / 2; stride >= kSharedSort; stride /= 2) sort_step(keys, ids, scores, size, width, stride, 0);
        __syncthreads();
        in_parts([&](int64_t base) {
            for (int64_t stride = kSharedSort / 2; stride > 0; stride /= 2) sort_step(k, i, s, kSharedSort, width, stride, base);
        });
    }
    __syncthreads();
}

// Bring a list into shared memory: all of it, or, if its keys allow, only those entries that can be among the `wanted` best, since
// sorting is what takes time. Equal slices of the range of keys are counted, and the slices below the one that holds the
// wanted-th best are left out; a slice is a monotone function of the key, so none that ranks goes with them. Returns the number
// of entries kept, in no order; 0 where they are more than shared memory takes, and then nothing is brought.
__device__ inline int64_t gather_best(const double* keys, const int64_t* ids, const float* scores, int64_t held, int64_t wanted,
                                      Shared<double> k, Shared<int64_t> i, Shared<float> s, Shared<unsigned> scratch) {
    constexpr int kEach = kSharedSort / kSortThreads;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    double key[kEach];                                   // of the first entries; longer lists are read again
    const double lowest = -__uint_as_float(0x7F800000);  // the key of padding, among others: in the last slice, and not of the range
    double best = lowest, worst = -lowest;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const int64_t at = thread + j * kSortThreads;
        key[j] = at < held ? keys[at] : 0.0;
    }
    const auto each = [&](const auto& visit) {
#pragma unroll
        for (int j = 0; j < kEach; ++j)
            if (thread + j * kSortThreads < held) visit(thread + j * kSortThreads, key[j]);
        for (int64_t at = thread + kSharedSort; at < held; at += kSortThreads) visit(at, keys[at]);
    };
    each([&](int64_t, double x) { best = fmax(best, x), worst = x == lowest ? worst : fmin(worst, x); });
    // The range of all keys, through the memory of the bins: 2 x 32 doubles are 128 words.
    const Shared<double> ranges = shared_view<double>(shared_memory() + kSharedSort * 20);
    for (int distance = 16; distance > 0; distance /= 2) {
        best = fmax(best, __shfl_xor_sync(kAllLanes, best, distance));
        worst = fmin(worst, __shfl_xor_sync(kAllLanes, worst, distance));
    }
    if (lane == 0) ranges[warp] = best, ranges[32 + warp] = worst;
    __syncthreads();
    best = ranges[lane], worst = ranges[32 + lane];
    for (int distance = 16; distance > 0; distance /= 2) {
        best = fmax(best, __shfl_xor_sync(kAllLanes, best, distance));
        worst = fmin(worst, __shfl_xor_sync(kAllLanes, worst, distance));
    }
    __syncthreads();

    const double scale = kNarrowBins / (best - worst);  // 0, infinite or NaN if the range is: then everything is kept
    const bool pays = held > kSharedSort ? wanted <= kSharedSort : held > kNarrowFrom && held > 2 * wanted;
    const bool narrow = pays && scale > 0.0 && scale <= 1e300;
    const auto bin_of = [&](double x) {
        const double bin = (best - x) * scale;
        return bin < kNarrowBins ? static_cast<int>(bin) : kNarrowBins - 1;
    };
    int last_bin = kNarrowBins;
    const Shared<unsigned> bins = scratch;  // the keys' own place: nothing is stored there yet
    const Shared<unsigned> control = shared_view<unsigned>(shared_memory() + kSharedSort * 20);
    int64_t kept = held;
    if (thread == 0) control[0] = 0;
    if (narrow) {
        bins[thread] = 0;
        __syncthreads();
        each([&](int64_t, double x) { shared_add(bins, bin_of(x), 1); });
        __syncthreads();
        // Keys in all slices up to a thread's own: among its warp's, then with those of the warps before.
        const auto sum_up = [&](unsigned sum) {
            for (int distance = 1; distance < 32; distance *= 2) {
                const unsigned before = __shfl_up_sync(kAllLanes, sum, distance);
                if (lane >= distance) sum += before;
            }
            return sum;
        };
        const unsigned mine = bins[thread], of_warp = sum_up(mine);
        if (lane == 31) control[32 + warp] = of_warp;
        __syncthreads();
        const unsigned before = __shfl_sync(kAllLanes, sum_up(control[32 + lane]), (warp + 31) % 32);
        const int64_t reached = int64_t{of_warp} + (warp ? before : 0);
        if (reached - mine < wanted && reached >= wanted) control[1] = thread, control[2] = static_cast<unsigned>(reached);  // one thread
        __syncthreads();
        last_bin = static_cast<int>(control[1]), kept = static_cast<unsigned>(control[2]);
    }
    __syncthreads();  // done with the bins, whose place the keys take now
    if (kept > kSharedSort) return 0;
    each([&](int64_t at, double x) {
        if (narrow && bin_of(x) > last_bin) return;
        const int place = static_cast<int>(shared_add(control, 0, 1));
        k[place] = x, i[place] = ids[at], s[place] = scores[at];
    });
    __syncthreads();
    return kept;
}

}  // namespace dqe::cuda
