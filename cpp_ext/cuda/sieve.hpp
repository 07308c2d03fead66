// Top-k candidates straight from the registers that hold a tile's products: most tiles hold next to nothing that reaches its
// query's limit, and then nothing is written anywhere. What does goes through a short queue of each warp, so that a trip to device
// memory is paid for many entries at once. For what this does not cover (see `suits`), there is scan_items with Select.
#pragma once

#include "consumers.hpp"
#include "score_tile.hpp"

namespace dqe::cuda {

constexpr int kSieveStages = 4;
constexpr int kQueued = 64;  // entries of a warp's queue: at least 32 more than none
constexpr int kQueueBytes = kQueued * 16;

// Shared memory of a block, in bytes: the queries, the ring, the queues.
__host__ __device__ constexpr int64_t sieve_ring(int query_rows, int query_parts, int chunks) {
    return int64_t{query_rows} * query_parts * chunks * kChunkBytes;
}
__host__ __device__ constexpr int64_t sieve_bytes(int query_rows, int query_parts, int chunks) {
    return sieve_ring(query_rows, query_parts, chunks) + kSieveStages * kItemStageBytes + kWarps * kQueueBytes;
}

template <Product product, int Rows>
class Sieve {
  public:
    using Products = Accumulators<product, Rows>;
    static constexpr int kSpan = Products::kWide * 8;  // columns of a warp

    // Whether a warp's columns are whole items, rows can be copied 16 bytes at a time, and products are as they are below.
    static bool suits(const Scan& scan) { return scan.aligned && !scan.gather && scan.tokens <= kSpan && kSpan % scan.tokens == 0; }

    __device__ Sieve(const Scan& scan, const Candidates& list, Shared<unsigned char> queues) : scan_(scan), list_(list) {
        const Shared<unsigned char> mine = queues + static_cast<int>(threadIdx.x / 32) * kQueueBytes;
        ids_ = shared_view<int64_t>(mine), scores_ = shared_view<float>(mine + kQueued * 8), rows_ = shared_view<int>(mine + kQueued * 12);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int64_t query = query_of(group);
            const bool wanted = query < scan.batch && list.pending[query];
            limit_[group] = wanted ? static_cast<float>(list.limit_keys[query]) : __uint_as_float(0x7FC00000);  // NaN: nothing passes
            if (product == Product::split_half) unscale_[group] = wanted ? scan.unscale[query] : 0.0f;
        }
    }

    __device__ void take(const ColumnTile& columns, const Products& products) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            float best = products.value[group / 2][0][group % 2 * 2];
#pragma unroll
            for (int n = 0; n < Products::kWide; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float value = products.value[group / 2][n][group % 2 * 2 + i];
                    // A split query's NaN asks for a second look; otherwise NaN never ranks, and hides what does if it is of no item.
                    best = product == Product::split_half ? nan_max(best, value) : fmaxf(best, value);
                }
            if (product == Product::split_half) best *= unscale_[group];
            const bool reached = best >= limit_[group] || (product == Product::split_half && best != best);
            if (__ballot_sync(kAllLanes, reached)) offer(columns, products, group);
        }
    }

    // Send on what the queue holds.
    __device__ void flush() {
        __syncwarp();
        for (int at = threadIdx.x % 32; at < queued_; at += 32) {
            const int64_t query = int64_t{blockIdx.x} * Rows + rows_[at];
            const auto place = static_cast<int64_t>(atomicAdd(&list_.counts[query], 1ull));
            if (place >= list_.capacity) continue;
            const int64_t to = query * list_.capacity + place;
            const float score = scores_[at];
            list_.keys[to] = score;
            list_.ids[to] = ids_[at];
            list_.scores[to] = score;
        }
        __syncwarp();
        queued_ = 0;
    }

  private:
    static constexpr int kGroups = Products::kTall * 2;  // of 8 rows; a lane has 2 * kWide values of one row of each

    __device__ static int row_of(int group) { return Products::top(threadIdx.x / 32) + group * 8 + threadIdx.x % 32 / 4; }
    __device__ static int64_t query_of(int group) { return int64_t{blockIdx.x} * Rows + row_of(group); }
    __device__ static int column_of(int place) {
        return Products::left(threadIdx.x / 32) + place / 2 * 8 + threadIdx.x % 4 * 2 + place % 2;
    }

    // Queue what passes of a group, by all lanes of the warp. Inlined, so that `group` is a constant and names registers.
    __device__ __forceinline__ void offer(const ColumnTile& columns, const Products& products, int group) {
        const int64_t query = query_of(group);
        const int tokens = static_cast<int>(scan_.tokens);
        float score[Products::kWide * 2];
#pragma unroll
        for (int place = 0; place < Products::kWide * 2; ++place)
            score[place] = score_of<product, Rows>(scan_, columns, products.value[group / 2][place / 2][group % 2 * 2 + place % 2],
                                                   unscale_[group], query, column_of(place));
        if (tokens > 1) fold(score, tokens);
        unsigned passing = 0;
#pragma unroll
        for (int place = 0; place < Products::kWide * 2; ++place) {
            const int column = column_of(place);
            const bool passes = score[place] >= limit_[group] && column < columns.columns && (column & (tokens - 1)) == 0;
            passing |= unsigned{passes} << place;
        }
        while (__ballot_sync(kAllLanes, passing != 0)) {
            const int first = __ffs(static_cast<int>(passing)) - 1;
            float mine = score[0];
#pragma unroll
            for (int place = 1; place < Products::kWide * 2; ++place)
                if (place == first) mine = score[place];
            const int64_t id = columns.first_item + column_of(first) / tokens;
            const bool passes = passing && (mine > limit_[group] || static_cast<uint64_t>(id) <= static_cast<uint64_t>(list_.limit_ids[query])) &&
                                !excluded(query, id);
            queue(passes, row_of(group), id, mine);
            passing &= passing - 1;
        }
    }

    // Every value becomes the score of its item: the largest of its tokens' columns, NaN if one is.
    __device__ static void fold(float (&score)[Products::kWide * 2], int tokens) {
#pragma unroll
        for (int place = 0; place < Products::kWide * 2; place += 2) {
            float best = nan_max(score[place], score[place + 1]);
            for (int distance = 1; distance < 4 && distance * 2 < tokens; distance *= 2)
                best = nan_max(best, __shfl_xor_sync(kAllLanes, best, distance));
            score[place] = score[place + 1] = best;
        }
#pragma unroll
        for (int distance = 2; distance < Products::kWide * 2; distance *= 2)  // 8 columns are 2 places on
            if (distance * 4 < tokens)
#pragma unroll
                for (int place = 0; place < Products::kWide * 2; ++place)
                    if ((place & distance) == 0)
                        score[place] = score[place + distance] = nan_max(score[place], score[place + distance]);
    }

    __device__ bool excluded(int64_t query, int64_t id) const {
        if (!scan_.excluded_start) return false;
        int64_t at = scan_.excluded_start[query], above = scan_.excluded_start[query + 1];
        const int64_t end = above;
        while (at < above) {
            const int64_t middle = at + (above - at) / 2;
            if (scan_.excluded_ids[middle] < id)
                at = middle + 1;
            else
                above = middle;
        }
        return at < end && scan_.excluded_ids[at] == id;
    }

    __device__ void queue(bool passes, int row, int64_t id, float score) {
        const unsigned mask = __ballot_sync(kAllLanes, passes);
        if (queued_ + __popc(mask) > kQueued) flush();
        if (passes) {
            const int at = queued_ + __popc(mask & ((1u << threadIdx.x % 32) - 1));
            ids_[at] = id, scores_[at] = score, rows_[at] = row;
        }
        queued_ += __popc(mask);
    }

    const Scan& scan_;
    const Candidates& list_;
    Shared<int64_t> ids_;
    Shared<float> scores_;
    Shared<int> rows_;
    int queued_ = 0;
    float limit_[kGroups], unscale_[kGroups] = {};
};

}  // namespace dqe::cuda
