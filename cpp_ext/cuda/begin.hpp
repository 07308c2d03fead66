// The kernel that a block of queries begins with: it leaves all that later kernels find, so that nothing is filled or reset in between.
#pragma once

#include "codes.hpp"
#include "query_kernels.hpp"

namespace dqe::cuda {

struct Beginning {
    const unsigned char* queries;  // (batch, width)
    bool half;
    int64_t batch, width;
    int rows, chunks;  // of the tiles of prepared queries
    unsigned char* prepared;
    float* unscale;
    Candidates list;  // to be reset; without counts: none
    int64_t held;     // see reset_list
    // Where the codes are screened:
    int code_rows, code_chunks;
    CodedQueries coded;
    unsigned long long *pair_counts, *column_counts;  // (tiles), to be 0
    int64_t tiles;
    volatile unsigned* failed;
};

// A warp for each row of the query tiles: blockIdx.y is 0 for what all searches need, and 1 for what screens do.
template <Product product>
__global__ void begin_queries(Beginning b) {
    admit_next();
    const int64_t query = blockIdx.x;
    if (blockIdx.y == 0) {
        if (query < (b.batch + b.rows - 1) / b.rows * b.rows)
            prepare_query<product>(b.queries, b.half, b.batch, b.width, query, b.rows, b.chunks, b.prepared, b.unscale);
        if (b.list.counts && query < b.batch && threadIdx.x == 0) reset_list(b.list, query, b.held);
    } else {
        if (query < (b.batch + b.code_rows - 1) / b.code_rows * b.code_rows)
            encode_query(b.queries, b.half, b.batch, b.width, query, b.code_rows, b.code_chunks, b.coded, b.failed);
        if (query < b.tiles && threadIdx.x == 0) b.pair_counts[query] = b.column_counts[query] = 0;
    }
}

}  // namespace dqe::cuda
