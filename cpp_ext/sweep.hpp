// One pass over a gallery for a block of queries: top-k, zone counts and mid-zone picks, without the score matrix.
//
// Every query has a threshold below which an item can change nothing but the number of easy ones; it rises as better items
// turn up. Tiles are scored (or bounded from their codes, screen.hpp) while they are in cache, entries that reach the
// threshold are taken one by one, and all others are counted by subtraction at the end. So selection costs next to nothing
// beside the inner products, whatever is asked for.
#pragma once

#include <cstdint>

#include "allowed.hpp"
#include "lists.hpp"
#include "prefix.hpp"
#include "tiles.hpp"
#include "zone_select.hpp"

namespace dqe::cpu {

// Consecutive items of a gallery: (count, tokens, width) float32 or, where the gallery is `half`, float16; and their codes.
struct Shard {
    const void* data;
    int64_t count;
    const uint8_t* codes;  // all null where the gallery is not screened
    const float *scales, *errors, *norms;
};

struct Gallery {
    const Shard* shards;
    int64_t shard_count, size, tokens, width;  // size: items of all shards, below 2^32 - 1
    bool half, screened;
    const TokenLists* lists = nullptr;  // of the first items of the gallery, where they are to be used; it is screened then
    const Prefix* prefix = nullptr;     // likewise; for sweeps by rows. With lists: of their items, in the order of their rows
};

// Row b excludes ids[offsets[b]] to ids[offsets[b + 1] - 1], ascending and distinct: what few items a query leaves out by itself,
// which as bits would take the size of the gallery for each query.
struct Exclusions {
    const int64_t *offsets, *ids;
};

// How a query's zone is found. given: anchor, lo and hi are inputs. from_best: lo and hi are, the anchor is the query's best
// score. rank: lo and hi are ranks as fractions, the anchor is an input unless `anchor_is_best`.
enum class Zoning : int { none = 0, given = 1, from_best = 2, rank = 3 };

// complete: all is set. outgrown: the zone outgrew `field`; counts and picks are not set, the bounds are. misjudged: the sample
// raised the thresholds too far; sweep again without one. scattered: lists leave too much; sweep again without them.
enum class Status : int8_t { complete = 0, outgrown = 1, misjudged = 2, scattered = 3 };

// All arrays are the caller's; (B, ...) row-major.
struct Outcome {
    float* top_scores;  // (B, k), padded with -inf
    int64_t* top_ids;   // (B, k), padded with -1
    float *anchor, *lo, *hi;
    int64_t* counts;    // (B, 3)
    double* pick_keys;  // (B, P)
    int64_t* picks;     // (B, P), padded with -1
    float* pick_scores;
    int8_t* status;  // (B,): a Status
};

struct Sweep {
    const float* queries;       // (B, width)
    const int64_t* query_rows;  // (B,): which row of the whole batch each query is; pick keys depend on it
    int64_t batch;
    Gallery gallery;
    Bitmap allowed;  // candidates are what it allows and `excluded` does not hold
    Exclusions excluded;
    int64_t k, picks;
    Zoning zoning;
    bool anchor_is_best;
    const int64_t* anchor_ids;  // null: see Zoning; else `anchor` is set to these items' scores first
    double lo, hi;              // of from_best and rank
    PickRule rule;
    int64_t sample;       // candidates to look at first, here and there, to guess thresholds from; 0: none
    int64_t field;        // entries a query may hold while its zone is not known (from_best, rank)
    bool by_rows;         // score row by row (at most max_row_queries queries, or any number by lists), not in panels
    int64_t most_listed;  // tokens that may be visited for a query, beyond which it is scattered; of a gallery with lists
    int threads;          // at least 1
    const TileKernels* kernels;
};

// Returns how many (query, item) pairs were scored again in full after screening. Throws std::bad_alloc.
int64_t run(const Sweep& sweep, const Outcome& out);

}  // namespace dqe::cpu
