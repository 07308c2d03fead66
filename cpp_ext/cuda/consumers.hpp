// What becomes of the scores of a tile: candidates and zone counts, histograms, or the anchors' scores. The scores end here, and
// only what may still rank goes to device memory; kept.hpp is for where they have to be read again.
#pragma once

#include "../zone_select.hpp"
#include "scan.hpp"

namespace dqe::cuda {

// Per query, a list of entries that may be among the `wanted` best, appended in no particular order. An entry may be if it
// ranks no lower than the limit, which is the wanted-th best entry of some subset (none yet: key -inf, id -1). Where more pass
// than the capacity, the count runs on and what was stored gives a better limit.
struct Candidates {
    double* keys;  // (batch, capacity)
    int64_t* ids;
    float* scores;
    unsigned long long* counts;  // (batch)
    double* limit_keys;
    int64_t* limit_ids;
    unsigned* pending;  // (batch): 0 once the list was complete
    int64_t wanted, capacity;
};

// Keys by rank_before, ids as unsigned: -1 stands behind all. False for a NaN key and for a NaN limit.
template <typename Key>
__host__ __device__ inline bool within_limit(Key key, int64_t id, Key limit_key, int64_t limit_id) {
    return key > limit_key || (key == limit_key && static_cast<uint64_t>(id) <= static_cast<uint64_t>(limit_id));
}

// Called by a whole warp for one query: the lanes that pass reserve their places with one atomic.
__device__ inline void append(const Candidates& list, int64_t query, bool passes, double key, int64_t id, float score) {
    const unsigned mask = __ballot_sync(kAllLanes, passes);
    if (mask == 0) return;
    const int lane = threadIdx.x % 32, leader = __ffs(static_cast<int>(mask)) - 1;
    unsigned long long place = 0;
    if (lane == leader) place = atomicAdd(&list.counts[query], static_cast<unsigned long long>(__popc(mask)));
    place = __shfl_sync(kAllLanes, place, leader) + __popc(mask & ((1u << lane) - 1));
    if (!passes || place >= static_cast<unsigned long long>(list.capacity)) return;
    const int64_t at = query * list.capacity + static_cast<int64_t>(place);
    list.keys[at] = key;
    list.ids[at] = id;
    list.scores[at] = score;
}

// The same for one lane by itself.
__device__ inline void append_one(const Candidates& list, int64_t query, double key, int64_t id, float score) {
    const unsigned long long place = atomicAdd(&list.counts[query], 1ull);
    if (place >= static_cast<unsigned long long>(list.capacity)) return;
    const int64_t at = query * list.capacity + static_cast<int64_t>(place);
    list.keys[at] = key;
    list.ids[at] = id;
    list.scores[at] = score;
}

// State of each row of the query tile, in shared memory; a row's is touched by its own warp only.
template <int Rows>
struct RowState {
    Shared<int64_t> top_id, pick_id, counts, excluded_next, excluded_at, excluded_end;
    Shared<double> pick_key;
    Shared<float> top_key, anchor, lo, hi;

    __device__ explicit RowState(Shared<unsigned char> base) {
        const auto wide = [&](int slot) { return shared_view<int64_t>(base + slot * Rows * 8); };
        const auto narrow = [&](int slot) { return shared_view<float>(base + Rows * 72 + slot * Rows * 4); };
        top_id = wide(0), pick_id = wide(1), counts = wide(2), excluded_next = wide(5), excluded_at = wide(6), excluded_end = wide(7);
        pick_key = shared_view<double>(base + 8 * Rows * 8);
        top_key = narrow(0), anchor = narrow(1), lo = narrow(2), hi = narrow(3);
    }

    // For each row that this lane sets up: row % 8 is its warp.
    template <typename Visit>
    __device__ static void own_rows(const Scan& scan, const Visit& visit) {
        const int row = threadIdx.x / 32 + kWarps * (threadIdx.x % 32);
        const int64_t query = int64_t{blockIdx.x} * Rows + row;
        if (row < Rows && query < scan.batch) visit(row, query);
        __syncwarp();
    }

    __device__ void begin_exclusions(const Scan& scan) {
        if (!scan.excluded_start) return;
        own_rows(scan, [&](int row, int64_t query) {
            const int64_t start = scan.excluded_start[query], end = scan.excluded_start[query + 1];
            excluded_at[row] = start;
            excluded_end[row] = end;
            excluded_next[row] = start < end ? scan.excluded_ids[start] : INT64_MAX;
        });
    }

    // Turn the scores of excluded items into NaN. Tiles come in ascending order, so a cursor per row suffices, and mostly one
    // comparison.
    __device__ void hide_excluded(const Scan& scan, int row, Shared<float> scores, int stride, int64_t first_item, int items) {
        if (!scan.excluded_start) return;
        int64_t next = excluded_next[row];
        if (next >= first_item + items) return;
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            int64_t at = excluded_at[row];
            const int64_t end = excluded_end[row];
            for (int64_t above = end; at < above;) {  // the first entry from first_item on
                const int64_t middle = at + (above - at) / 2;
                if (scan.excluded_ids[middle] < first_item)
                    at = middle + 1;
                else
                    above = middle;
            }
            for (next = INT64_MAX; at < end; ++at) {
                next = scan.excluded_ids[at];
                if (next >= first_item + items) break;
                scores[(next - first_item) * stride] = __uint_as_float(0x7FC00000);
            }
            excluded_at[row] = at;
            excluded_next[row] = at < end ? next : INT64_MAX;
        }
        __syncwarp();
    }
};

struct Selection {
    Candidates top, picks;
    bool want_top, want_picks, want_counts;
    PickRule rule;
    int64_t first_query;  // the row in the caller's batch that query 0 is: the draws depend on it
    const float* anchor;  // (batch)
    const float* lo;
    const float* hi;
    int64_t* counts;  // (batch, 3)
};

// What the pass that keeps scores gets.
struct Keeping {
    Kept kept;
    Selection selection;
};

// Top-k candidates, zone counts and pick candidates.
template <int Rows>
struct Select {
    const Scan& scan;
    const Selection& selection;
    RowState<Rows> state;

    __device__ Select(const Scan& scan, const Selection& selection, Shared<unsigned char> base)
        : scan(scan), selection(selection), state(base) {
        state.begin_exclusions(scan);
        state.own_rows(scan, [&](int row, int64_t query) {
            const Selection& s = this->selection;
            const double never = __uint_as_float(0x7FC00000);  // a NaN limit lets nothing pass
            if (s.want_top) {
                state.top_key[row] = static_cast<float>(s.top.pending[query] ? s.top.limit_keys[query] : never);
                state.top_id[row] = s.top.limit_ids[query];
            }
            if (s.want_picks) {
                state.pick_key[row] = s.picks.pending[query] ? s.picks.limit_keys[query] : never;
                state.pick_id[row] = s.picks.limit_ids[query];
            }
            if (s.want_picks || s.want_counts) {
                state.anchor[row] = s.anchor[query], state.lo[row] = s.lo[query], state.hi[row] = s.hi[query];
                for (int zone = 0; zone < 3; ++zone) state.counts[row * 3 + zone] = 0;
            }
        });
    }

    __device__ void take(int row, int64_t query, Shared<float> scores, int stride, int64_t first_item, int items) {
        state.hide_excluded(scan, row, scores, stride, first_item, items);
        const int lane = threadIdx.x % 32;
        const bool want_zones = selection.want_picks || selection.want_counts;
        if (!want_zones) {  // mostly nothing reaches the limit, and one vote says so for the whole row
            const float limit = state.top_key[row];
            bool reached = false;
            for (int place = lane; place < items; place += 32) reached |= scores[place * stride] >= limit;
            if (__ballot_sync(kAllLanes, reached) == 0) return;
        }
        unsigned zones[3] = {};
        for (int base = 0; base < items; base += 32) {
            const int place = base + lane;
            const int64_t id = first_item + place;
            const float score = place < items ? scores[place * stride] : __uint_as_float(0x7FC00000);
            if (selection.want_top)
                append(selection.top, query, within_limit<float>(score, id, state.top_key[row], state.top_id[row]), score, id, score);
            if (!want_zones) continue;
            const float delta = state.anchor[row] - score, lo = state.lo[row], hi = state.hi[row];
            const bool inside = delta >= lo && delta <= hi;
            const unsigned mid = __ballot_sync(kAllLanes, inside);
            if (selection.want_counts) {
                zones[0] += __popc(__ballot_sync(kAllLanes, delta < lo));
                zones[1] += __popc(mid);
                zones[2] += __popc(__ballot_sync(kAllLanes, delta > hi));
            }
            if (!selection.want_picks || mid == 0) continue;
            const double key = inside ? pick_key(selection.rule, score, selection.first_query + query, id) : 0.0;
            append(selection.picks, query, inside && within_limit<double>(key, id, state.pick_key[row], state.pick_id[row]), key, id,
                   score);
        }
        if (selection.want_counts && lane == 0)
            for (int zone = 0; zone < 3; ++zone) state.counts[row * 3 + zone] += zones[zone];
    }

    __device__ void end() {
        if (!selection.want_counts) return;
        __syncwarp();
        state.own_rows(scan, [&](int row, int64_t query) {
            for (int zone = 0; zone < 3; ++zone) {
                auto* total = reinterpret_cast<unsigned long long*>(selection.counts + query * 3 + zone);
                atomicAdd(total, static_cast<unsigned long long>(static_cast<int64_t>(state.counts[row * 3 + zone])));
            }
        });
    }
};

// Scores as integers that ascend as scores descend, so that rank 0 is the best; -0 and +0 are one score.
__device__ inline uint32_t descending_image(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000 ? bits : ~(bits | 0x80000000);
}

__device__ inline float score_of_image(uint32_t image) { return __uint_as_float(image & 0x80000000 ? image : ~(image | 0x80000000)); }

// Radix selection of two ranks per query: levels of 11, 11 and 10 bits of the image.
constexpr int kLevels = 3;
constexpr int kBins = 2048;
constexpr unsigned kNoBin = ~0u;
__host__ __device__ constexpr int level_shift(int level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }

struct Ranks {
    int level;
    unsigned long long* bins;  // (batch, 2, kBins); at level 0 both ranks use the first
    const uint32_t* prefixes;  // (batch, 2): the image's bits above this level's, known from the levels before

    // Which bin of rank `at` a score counts for, or kNoBin.
    __device__ unsigned bin_of(float score, uint32_t image, int shift, int64_t at) const {
        const bool counts = score == score && (level == 0 || image >> level_shift(level - 1) == prefixes[at]);
        return counts ? image >> shift & (level == 2 ? 1023 : kBins - 1) : kNoBin;
    }
};

template <int Rows>
struct Histogram {
    const Scan& scan;
    const Ranks& ranks;
    RowState<Rows> state;

    __device__ Histogram(const Scan& scan, const Ranks& ranks, Shared<unsigned char> base) : scan(scan), ranks(ranks), state(base) {
        state.begin_exclusions(scan);
    }

    __device__ void take(int row, int64_t query, Shared<float> scores, int stride, int64_t first_item, int items) {
        state.hide_excluded(scan, row, scores, stride, first_item, items);
        const int lane = threadIdx.x % 32, shift = level_shift(ranks.level);
        for (int base = 0; base < items; base += 32) {
            const int place = base + lane;
            const float score = place < items ? scores[place * stride] : __uint_as_float(0x7FC00000);
            const uint32_t image = descending_image(score);
            for (int rank = 0; rank < (ranks.level == 0 ? 1 : 2); ++rank) {
                // Scores cluster in few bins: one atomic for all lanes of a bin.
                const unsigned bin = ranks.bin_of(score, image, shift, query * 2 + rank);
                const unsigned same = __match_any_sync(kAllLanes, bin);
                if (bin != kNoBin && lane == __ffs(static_cast<int>(same)) - 1)
                    atomicAdd(&ranks.bins[(query * 2 + rank) * kBins + bin], static_cast<unsigned long long>(__popc(same)));
            }
        }
    }

    __device__ void end() {}
};

// Whose score each gathered item is, and where it goes. For anchors both are simple: item j of a query tile's list is row j's, and the
// scores are (batch).
struct Gathering {
    float* anchors;  // or null, and then:
    const int* rows;
    float* scores;                     // both (query tiles, gather_pitch)
    const unsigned long long* counts;  // (query tiles): how many there are of `gathered` at most; the grid is as large as if all were
    Candidates list;                   // with keys: each item is a candidate at once, and the scores are written nowhere else
    volatile unsigned* rescored;       // how many there were, with a list; of all blocks of queries since it was lowered
};

template <int Rows>
struct Gather {
    const Scan& scan;
    const Gathering& to;

    __device__ Gather(const Scan& scan, const Gathering& to, Shared<unsigned char>) : scan(scan), to(to) {}

    // Leave out of the scan what the list does not have.
    __device__ static void shorten(Scan& scan, const Gathering& to) {
        if (!to.counts) return;
        const int64_t count = static_cast<int64_t>(to.counts[blockIdx.x]);
        if (count < scan.gathered) scan.gathered = count;
        scan.tiles = (scan.gathered + scan.items_per_tile - 1) / scan.items_per_tile;
    }

    __device__ void take(int row, int64_t query, Shared<float> scores, int stride, int64_t first_item, int items) {
        const int lane = threadIdx.x % 32;
        if (to.anchors) {
            if (row >= first_item && row < first_item + items && lane == 0) to.anchors[query] = scores[(row - first_item) * stride];
            return;
        }
        const int64_t first = int64_t{blockIdx.x} * scan.gather_pitch + first_item;
        for (int place = lane; place < items; place += 32) {
            if (to.rows[first + place] != row) continue;
            const float score = scores[place * stride];
            const int64_t id = scan.gather[first + place];
            if (!to.list.keys)
                to.scores[first + place] = score;
            else if (within_limit<double>(score, id, to.list.limit_keys[query], to.list.limit_ids[query]))
                append_one(to.list, query, score, id, score);
        }
    }

    __device__ void end() {
        if (!to.list.keys || blockIdx.x || blockIdx.y || threadIdx.x) return;
        unsigned total = 0;
        for (unsigned tile = 0; tile < gridDim.x; ++tile) total += static_cast<unsigned>(to.counts[tile]);
        *to.rescored = *to.rescored + total;
    }
};

}  // namespace dqe::cuda
