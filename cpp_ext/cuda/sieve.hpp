// What becomes of a tile's scores while they are still in the registers that the products left them in: top-k candidates here, zone
// counts and pick candidates in zone_sieve.hpp. Most tiles hold next to nothing that reaches a limit, and then nothing is written anywhere.
// What does goes through a short queue of each warp, so that a trip to device memory, or the drawing of keys, is paid for many entries at
// once. For what this does not cover (see `suits`), there is scan_items with Select.
#pragma once

#include "consumers.hpp"
#include "score_tile.hpp"

namespace dqe::cuda {

// Stages of the ring. Queries in two parts leave room for two only, if there are to be two blocks on a multiprocessor.
__host__ __device__ constexpr int sieve_stages(int query_rows, int query_parts, bool zones) {
    return query_rows == 64 && query_parts == 2 && !zones ? 2 : 4;
}
constexpr int kQueued = 64;  // entries of a warp's queue: at least 32 more than none
constexpr int kQueueBytes = kQueued * 16;
constexpr int kBoundsBytes = 3 * 4;  // of a row: anchor and bounds of zones

// Shared memory of a block, in bytes: the queries, the ring, queues for each warp, and where zones are wanted their bounds.
__host__ __device__ constexpr int64_t sieve_ring(int query_rows, int query_parts, int chunks) {
    return int64_t{query_rows} * query_parts * chunks * kChunkBytes;
}
__host__ __device__ constexpr int64_t sieve_bytes(int query_rows, int query_parts, int chunks, bool zones) {
    const int64_t queues = kWarps * kQueueBytes;
    return sieve_ring(query_rows, query_parts, chunks) + sieve_stages(query_rows, query_parts, zones) * kItemStageBytes + queues +
           (zones ? queues + query_rows * kBoundsBytes : 0);
}

// Entries that a warp has found and not yet dealt with. All of its lanes call these together; `deal(row, id, score)` is called for
// 32 entries at a time, by a lane each.
class Queue {
  public:
    __device__ explicit Queue(Shared<unsigned char> queues) {
        const Shared<unsigned char> mine = queues + static_cast<int>(threadIdx.x / 32) * kQueueBytes;
        ids_ = shared_view<int64_t>(mine), scores_ = shared_view<float>(mine + kQueued * 8), rows_ = shared_view<int>(mine + kQueued * 12);
    }

    template <typename Deal>
    __device__ void push(bool wanted, int row, int64_t id, float score, const Deal& deal) {
        const unsigned mask = __ballot_sync(kAllLanes, wanted);
        if (queued_ + __popc(mask) > kQueued) flush(deal);
        if (wanted) {
            const int at = queued_ + __popc(mask & ((1u << threadIdx.x % 32) - 1));
            ids_[at] = id, scores_[at] = score, rows_[at] = row;
        }
        queued_ += __popc(mask);
    }

    template <typename Deal>
    __device__ void flush(const Deal& deal) {
        __syncwarp();
        for (int at = threadIdx.x % 32; at < queued_; at += 32)
            deal(static_cast<int>(rows_[at]), static_cast<int64_t>(ids_[at]), static_cast<float>(scores_[at]));
        __syncwarp();
        queued_ = 0;
    }

  private:
    Shared<int64_t> ids_;
    Shared<float> scores_;
    Shared<int> rows_;
    int queued_ = 0;
};

// Every value of a lane's places (two neighbouring columns of each eight) becomes the score of its item: the largest of its tokens'
// columns, NaN if one is.
template <int Places>
__device__ __forceinline__ void fold(float (&score)[Places], int tokens) {
#pragma unroll
    for (int place = 0; place < Places; place += 2) {
        float best = nan_max(score[place], score[place + 1]);
        for (int distance = 1; distance < 4 && distance * 2 < tokens; distance *= 2)
            best = nan_max(best, __shfl_xor_sync(kAllLanes, best, distance));
        score[place] = score[place + 1] = best;
    }
#pragma unroll
    for (int distance = 2; distance < Places; distance *= 2)  // 8 columns are 2 places on
        if (distance * 4 < tokens)
#pragma unroll
            for (int place = 0; place < Places; ++place)
                if ((place & distance) == 0) score[place] = score[place + distance] = nan_max(score[place], score[place + distance]);
}

// Whose scores a lane holds: kGroups rows, 8 apart, and kPlaces columns of each. `group` and `place` name registers where they are
// constants, so what takes them is inlined.
template <typename Products>
struct Lane {
    static constexpr Product product = Products::kProduct;
    static constexpr int Rows = Products::kRows;
    static constexpr int kGroups = Products::kTall * 2;
    static constexpr int kPlaces = Products::kWide * 2;
    static constexpr int kSpan = Products::kWide * 8;  // columns of a warp

    __device__ static int row_of(int group) { return Products::row_of(threadIdx.x / 32, group) + threadIdx.x % 32 / 4; }
    __device__ static int64_t query_of(int group) { return int64_t{blockIdx.x} * Rows + row_of(group); }
    __device__ static int column_of(int place) {
        return Products::left(threadIdx.x / 32) + place / 2 * 8 + threadIdx.x % 4 * 2 + place % 2;
    }
    __device__ static float value_of(const Products& products, int group, int place) {
        return products.value[group / 2][place / 2][group % 2 * 2 + place % 2];
    }

    // The scores of a group's places, each that of its whole item.
    __device__ static __forceinline__ void scores_of(const Scan& scan, const ColumnTile& columns, const Products& products, int group,
                                                     float unscale, float (&score)[kPlaces]) {
        float any = value_of(products, group, 0);
#pragma unroll
        for (int place = 0; place < kPlaces; ++place) {
            score[place] = value_of(products, group, place);
            if (product == Product::split_half) score[place] *= unscale, any = nan_max(any, score[place]);
        }
        if (product == Product::split_half && any != any)
#pragma unroll
            for (int place = 0; place < kPlaces; ++place)
                score[place] =
                    score_of<product, Rows>(scan, columns, value_of(products, group, place), unscale, query_of(group), column_of(place));
        if (scan.tokens > 1) fold(score, static_cast<int>(scan.tokens));
    }

    // The same in the products' own registers.
    __device__ static __forceinline__ void make_scores(const Scan& scan, const ColumnTile& columns, Products& products, int group,
                                                       float unscale) {
        float score[kPlaces];
        scores_of(scan, columns, products, group, unscale, score);
#pragma unroll
        for (int place = 0; place < kPlaces; ++place) products.value[group / 2][place / 2][group % 2 * 2 + place % 2] = score[place];
    }

    // Push the places of a group whose bit is set and that `passes(id, score)`. `score(place)` is called with constants.
    template <typename Score, typename Passes, typename Deal>
    __device__ static __forceinline__ void push(Queue& queue, unsigned places, const ColumnTile& columns, int tokens, int group,
                                                const Score& score, const Passes& passes, const Deal& deal) {
        while (__ballot_sync(kAllLanes, places != 0)) {
            const int first = __ffs(static_cast<int>(places)) - 1;
            float mine = score(0);
#pragma unroll
            for (int place = 1; place < kPlaces; ++place)
                if (place == first) mine = score(place);
            const int64_t id = columns.first_item + column_of(first) / tokens;
            queue.push(places && passes(id, mine), row_of(group), id, mine, deal);
            places &= places - 1;
        }
    }
};

// Whether a warp's columns are whole items, and rows can be copied 16 bytes at a time.
inline bool sieve_suits(const Scan& scan, int span) {
    return scan.unit == 16 && !scan.gather && scan.tokens <= span && span % scan.tokens == 0;
}

__device__ inline bool is_excluded(const Scan& scan, int64_t query, int64_t id) {
    if (!scan.excluded_start) return false;
    int64_t at = scan.excluded_start[query], above = scan.excluded_start[query + 1];
    const int64_t end = above;
    while (at < above) {
        const int64_t middle = at + (above - at) / 2;
        if (scan.excluded_ids[middle] < id)
            at = middle + 1;
        else
            above = middle;
    }
    return at < end && scan.excluded_ids[at] == id;
}

template <typename Products>
class Sieve {
    using L = Lane<Products>;
    static constexpr Product product = Products::kProduct;
    static constexpr int Rows = Products::kRows;

  public:
    __device__ Sieve(const Scan& scan, const Candidates& list, bool wanted, Shared<unsigned char> queues)
        : scan_(scan), list_(list), queue_(queues) {
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            const int64_t query = L::query_of(group);
            const bool pending = wanted && query < scan.batch && list.pending[query];
            limit_[group] = pending ? static_cast<float>(list.limit_keys[query]) : __uint_as_float(0x7FC00000);  // NaN: nothing passes
            if (product == Product::split_half) unscale_[group] = query < scan.batch ? scan.unscale[query] : 0.0f;
        }
    }

    // Write every score to memory, and queue what reaches its row's limit.
    __device__ void keep(const ColumnTile& columns, const Products& products, const Kept& kept) {
        const int tokens = static_cast<int>(scan_.tokens);
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            const int64_t query = L::query_of(group);
            float score[L::kPlaces];
            L::scores_of(scan_, columns, products, group, unscale_[group], score);
            float best = score[0];
#pragma unroll
            for (int place = 1; place < L::kPlaces; ++place) best = fmaxf(best, score[place]);
            if (query < scan_.batch) {
                float* row = kept.scores + query * kept.pitch + columns.first_item;
#pragma unroll
                for (int place = 0; place < L::kPlaces; place += 2) {
                    const int column = L::column_of(place);
                    if (tokens == 1)  // also beyond the items: rows are whole tiles
                        *reinterpret_cast<float2*>(row + column) = {score[place], score[place + 1]};
                    else if ((column & (tokens - 1)) == 0 && column < columns.columns)
                        row[column / tokens] = score[place];
                }
            }
            if (__ballot_sync(kAllLanes, best >= limit_[group])) offer(columns, products, group);
        }
    }

    // Queue what reaches its row's limit.
    __device__ void take(const ColumnTile& columns, const Products& products) {
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            float best = L::value_of(products, group, 0);
#pragma unroll
            for (int place = 1; place < L::kPlaces; ++place) {
                const float value = L::value_of(products, group, place);
                // A split query's NaN asks for a second look; otherwise NaN never ranks.
                best = product == Product::split_half ? nan_max(best, value) : fmaxf(best, value);
            }
            if (product == Product::split_half) best *= unscale_[group];
            const bool reached = best >= limit_[group] || (product == Product::split_half && best != best);
            if (__ballot_sync(kAllLanes, reached)) offer(columns, products, group);
        }
    }

    // The same once products have become scores (Lane::make_scores).
    __device__ void take_scores(const ColumnTile& columns, const Products& scores) {
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            float best = L::value_of(scores, group, 0);
#pragma unroll
            for (int place = 1; place < L::kPlaces; ++place) best = fmaxf(best, L::value_of(scores, group, place));
            if (__ballot_sync(kAllLanes, best >= limit_[group]))
                push(columns, group, [&](int place) { return L::value_of(scores, group, place); });
        }
    }

    // Instead of what passes: the best entry of each row among the warp's columns, in a place of the list that is its own. The
    // wanted-th best of these bounds the wanted-th best of all from below, and nobody waits for a place. Where nothing ranks the
    // entry is the padding of lists (key -inf, id -1).
    __device__ void sample(const ColumnTile& columns, const Products& products) const {
        const int tokens = static_cast<int>(scan_.tokens);
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
            const int64_t query = L::query_of(group);
            float score[L::kPlaces];
            L::scores_of(scan_, columns, products, group, unscale_[group], score);
            float best = -__uint_as_float(0x7F800000);
            int column = -1;
#pragma unroll
            for (int place = 0; place < L::kPlaces; ++place)
                if (score[place] > best && L::column_of(place) < columns.columns) best = score[place], column = L::column_of(place);
            for (int distance = 1; distance < 4; distance *= 2) {
                const float other = __shfl_xor_sync(kAllLanes, best, distance);
                const int its_column = __shfl_xor_sync(kAllLanes, column, distance);
                if (other > best) best = other, column = its_column;
            }
            if (threadIdx.x % 4 || query >= scan_.batch) continue;
            int64_t id = column < 0 ? -1 : columns.first_item + column / tokens;
            if (id >= 0 && is_excluded(scan_, query, id)) best = -__uint_as_float(0x7F800000), id = -1;
            const int64_t at = query * list_.capacity + columns.tile * Products::kAcross + threadIdx.x / 32 % Products::kAcross;
            list_.keys[at] = best;
            list_.ids[at] = id;
            list_.scores[at] = best;
        }
    }

    __device__ void end() {
        queue_.flush([&](int row, int64_t id, float score) { append_one(list_, row_query(row), score, id, score); });
    }

  private:
    __device__ static int64_t row_query(int row) { return int64_t{blockIdx.x} * Rows + row; }

    __device__ __forceinline__ void offer(const ColumnTile& columns, const Products& products, int group) {
        float score[L::kPlaces];
        L::scores_of(scan_, columns, products, group, unscale_[group], score);
        push(columns, group, [&](int place) { return score[place]; });
    }

    template <typename Score>
    __device__ __forceinline__ void push(const ColumnTile& columns, int group, const Score& score) {
        const int64_t query = L::query_of(group);
        const int tokens = static_cast<int>(scan_.tokens);
        const float limit = limit_[group];
        unsigned reaching = 0;
#pragma unroll
        for (int place = 0; place < L::kPlaces; ++place) {
            const int column = L::column_of(place);
            const bool reaches = score(place) >= limit && column < columns.columns && (column & (tokens - 1)) == 0;
            reaching |= unsigned{reaches} << place;
        }
        L::push(
            queue_, reaching, columns, tokens, group, score,
            [&](int64_t id, float mine) {
                return within_limit<float>(mine, id, limit, list_.limit_ids[query]) && !is_excluded(scan_, query, id);
            },
            [&](int row, int64_t id, float mine) { append_one(list_, row_query(row), mine, id, mine); });
    }

    const Scan& scan_;
    const Candidates& list_;
    Queue queue_;
    float limit_[L::kGroups], unscale_[L::kGroups] = {};
};

}  // namespace dqe::cuda
