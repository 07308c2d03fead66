// Scores that were kept: zones whose bounds are known only after all items are scored (the query's own best as the anchor, ranks), or
// that leave out what is excluded, without a second pass over the items. 4 bytes a score are read in their place, which costs less than the
// items do unless queries are many; `Plan` says when.
#pragma once

#include "zone_sieve.hpp"

namespace dqe::cuda {

constexpr int kKeptTile = kThreads * 4;  // items: four for each thread, 16 bytes

// Kept scores, and which items of them to look at: tile t begins at item t * stride * kKeptTile.
struct KeptItems {
    const float* scores;  // (batch, pitch)
    int64_t pitch, size;
    int64_t tiles, stride;
};

// The same as Sieve::keep, for what that does not cover.
template <int Rows>
struct KeepingSelect {
    const Keeping& keeping;
    Select<Rows> select;

    __device__ KeepingSelect(const Scan& scan, const Keeping& keeping, Shared<unsigned char> base)
        : keeping(keeping), select(scan, keeping.selection, base) {}

    __device__ void take(int row, int64_t query, Shared<float> scores, int stride, int64_t first_item, int items) {
        float* kept = keeping.kept.scores + query * keeping.kept.pitch + first_item;
        for (int place = threadIdx.x % 32; place < items; place += 32) kept[place] = scores[place * stride];
        __syncwarp();  // before excluded ones are hidden: one may be an anchor
        if (keeping.selection.want_top) select.take(row, query, scores, stride, first_item, items);
    }

    __device__ void end() {}
};

// The scores of the anchors' items; where there are no ids, query j's is item j. Positions outside the items are flagged.
__global__ void kept_anchors(KeptItems items, const int64_t* ids, int64_t batch, float* anchor, volatile unsigned* bad) {
    const int64_t query = int64_t{blockIdx.x} * 32 + threadIdx.x;
    if (query >= batch) return;
    const int64_t id = ids ? ids[query] : query;
    const bool inside = id >= 0 && id < items.size;
    anchor[query] = inside ? items.scores[query * items.pitch + id] : __uint_as_float(0x7FC00000);
    if (!inside) *bad = 1;
}

// The items of these ids one behind the other, `units` of 16 bytes each: a block for each. Positions outside the items are flagged, and the
// first item is taken.
__global__ void copy_items(const int64_t* ids, int64_t size, int64_t units, const uint4* items, uint4* to, volatile unsigned* bad) {
    const int64_t query = blockIdx.x;
    const bool inside = ids[query] >= 0 && ids[query] < size;
    const uint4* item = items + (inside ? ids[query] : 0) * units;
    for (int64_t unit = threadIdx.x; unit < units; unit += blockDim.x) to[query * units + unit] = item[unit];
    if (!inside) *bad = 1;
}

// NaN is in no zone and has no rank. A block of 32 threads per query.
__global__ void hide_excluded(Kept kept, const int64_t* start, const int64_t* ids) {
    const int64_t query = blockIdx.x;
    for (int64_t at = start[query] + threadIdx.x; at < start[query + 1]; at += 32)
        kept.scores[query * kept.pitch + ids[at]] = __uint_as_float(0x7FC00000);
}

// Calls `visit(first, score)` with this thread's four scores, NaN beyond the items, from item `first` on: by all threads together.
template <typename Visit>
__device__ __forceinline__ void each_kept(const KeptItems& items, const Visit& visit) {
    const float* row = items.scores + int64_t{blockIdx.x} * items.pitch;
    for (int64_t tile = blockIdx.y; tile < items.tiles; tile += gridDim.y) {
        const int64_t first = tile * items.stride * kKeptTile + threadIdx.x * 4;
        float4 read = {};
        if (first < items.size) read = *reinterpret_cast<const float4*>(row + first);  // the pitch is a multiple of four
        float score[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (first + j >= items.size) score[j] = __uint_as_float(0x7FC00000);
        visit(first, score);
    }
}

// Zone counts and pick candidates. Shared memory: a queue for each warp.
__global__ __launch_bounds__(kThreads) void kept_zones(KeptItems items, Selection selection) {
    const int64_t query = blockIdx.x;
    const float anchor = selection.anchor[query], lo = selection.lo[query], hi = selection.hi[query];
    Queue queue(shared_memory());
    const auto deal = [&](int, int64_t id, float score) { pick(selection, query, id, score); };
    unsigned counts[3] = {};
    each_kept(items, [&](int64_t first, const float (&score)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float delta = anchor - score[j];
            const bool inside = delta >= lo && delta <= hi;
            counts[0] += delta<lo, counts[1] += inside, counts[2] += delta> hi;
            if (selection.want_picks && __ballot_sync(kAllLanes, inside)) queue.push(inside, 0, first + j, score[j], deal);
        }
    });
    queue.flush(deal);
    if (!selection.want_counts) return;
    for (int zone = 0; zone < 3; ++zone) {
        unsigned sum = counts[zone];
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
        if (threadIdx.x % 32 == 0 && sum)
            atomicAdd(reinterpret_cast<unsigned long long*>(selection.counts + query * 3 + zone), static_cast<unsigned long long>(sum));
    }
}

// A level of the radix selection of ranks. Shared memory: 2 x kBins counters.
__global__ __launch_bounds__(kThreads) void kept_histogram(KeptItems items, Ranks ranks) {
    const int64_t query = blockIdx.x;
    const Shared<unsigned> bins = shared_view<unsigned>(shared_memory());
    const int both = ranks.level == 0 ? 1 : 2, shift = level_shift(ranks.level);
    for (int bin = threadIdx.x; bin < both * kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    each_kept(items, [&](int64_t, const float (&score)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t image = descending_image(score[j]);
            for (int rank = 0; rank < both; ++rank) {
                const unsigned bin = ranks.bin_of(score[j], image, shift, query * 2 + rank);
                if (__ballot_sync(kAllLanes, bin != kNoBin) == 0) continue;
                // Scores cluster in few bins: one atomic for all lanes of a bin.
                const unsigned same = __match_any_sync(kAllLanes, bin);
                if (bin != kNoBin && threadIdx.x % 32 == __ffs(static_cast<int>(same)) - 1u)
                    shared_add(bins, rank * kBins + bin, __popc(same));
            }
        }
    });
    __syncthreads();
    for (int bin = threadIdx.x; bin < both * kBins; bin += kThreads)
        if (const unsigned count = bins[bin]) atomicAdd(&ranks.bins[query * 2 * kBins + bin], static_cast<unsigned long long>(count));
}

}  // namespace dqe::cuda
