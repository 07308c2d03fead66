// Screening: which items may be among the best is told from bounds of their scores, at half or a quarter of the bytes, and only those are
// scored. A pass over the codes (screen_kernel, on Hopper hopper_screen_kernel) writes down two things:
//  - pairs of a query and an item with a token whose upper bound reaches the limit, and which tokens these are;
//  - items whose lower bound reaches it, in the list of the best. The wanted-th best of these bounds the wanted-th best score from below,
//    so that a limit which a small sample left becomes a sharp one, before anything is scored.
// Then spread_pairs lays out the tokens of the pairs that reach the new limit, scan_kernel<Gather> scores them with the code that scores
// anchors, and collect_scores folds tokens into items. What is scored is therefore equal to the bit to what a pass over the items finds.
#pragma once

#include "consumers.hpp"
#include "zones.hpp"

namespace dqe::cuda {

// The queries of a block, coded. Numbers are (batch).
struct CodedQueries {
    unsigned char* codes;  // [query tile][chunk][row][128 bytes]
    float *scales, *norms, *errors;
};

// In no order, per query tile. `tokens`: a bit for each token of the item whose bound reached the limit. A count that exceeds the capacity
// means that some are missing.
struct Pairs {
    int64_t* items;
    unsigned* tokens;
    int* rows;      // of the query tile
    float* bounds;  // the largest of the item's; NaN where a token has none
    int* places;    // of its first token in Columns, or -1
    unsigned long long* counts;
    int64_t capacity;
};

// The tokens to be scored, per query tile.
struct Columns {
    int64_t* tokens;  // positions in (items, tokens)
    int* rows;
    float* scores;
    unsigned long long* counts;
    int64_t capacity;
};

struct Screening {
    CodedItems items;
    CodedQueries queries;
    Candidates list;
    Pairs pairs;
};

}  // namespace dqe::cuda
