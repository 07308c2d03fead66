// The shape of a scoring pass: what it reads, how it is cut into tiles, and where things lie in shared memory.
//
// A block scores one tile of queries (16 or 64) against tiles of 128 token columns. Operands are cut along D into chunks of
// 128 bytes; a chunk of an operand is `rows` x 128 bytes in shared memory, its 16-byte units swizzled against bank conflicts.
// Item chunks arrive through a ring of stages. The queries stay in shared memory for the whole pass where they fit, and
// otherwise come along with each item chunk.
#pragma once

#include "platform.hpp"

namespace dqe::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 128;     // token columns per tile
constexpr int kChunkBytes = 128;  // along D
constexpr int kItemStageBytes = kColumns * kChunkBytes;
constexpr int kScorePitch = 136;  // 8 banks on from row to row: the product's 2-float stores then do not collide
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// How operands meet. f16 items use tensor cores; f32 queries are then split into two f16 parts (see query_kernels.hpp). Codes are 8-bit
// integers, whose products give bounds of scores (see screen.hpp).
enum class Product { half = 0, split_half = 1, single = 2, codes = 3 };

template <Product product>
struct Format {
    static constexpr int element_bytes = product == Product::single ? 4 : product == Product::codes ? 1 : 2;
    static constexpr int query_parts = product == Product::split_half ? 2 : 1;
    static constexpr int chunk_elements = kChunkBytes / element_bytes;
};

// Byte offset of 16-byte unit `unit` (0 to 7) of row `row` in a chunk: eight neighbouring rows hold it in eight banks groups.
__host__ __device__ constexpr int chunk_offset(int row, int unit) { return row * kChunkBytes + ((unit ^ (row & 7)) << 4); }

struct Scan {
    const unsigned char* queries;  // prepared: [query tile][chunk][part][row][128 bytes]
    const float* unscale;          // (batch): powers of two; NaN for a query with a NaN coordinate
    const float* exact_queries;    // (batch, width) f32, or null where the product needs no second look at NaN scores
    const unsigned char* items;    // (size, tokens, width)
    int64_t batch, size;
    int64_t tokens, width;
    int chunks;
    int items_per_tile;  // max(1, 128 / tokens)
    int64_t steps;       // column tiles per item tile: more than one where tokens > 128
    int64_t tiles;       // item tiles to score; tile t starts at item t * stride * items_per_tile
    int64_t stride;
    const int64_t* gather;  // null, or (query tiles, gather_pitch): score the items of these ids instead, `gathered` of them per query tile
    int64_t gather_pitch, gathered;
    int stages;
    bool resident;
    int unit;                       // bytes that each row begins at a multiple of: 16, 8, 4 or 2
    const int64_t* excluded_start;  // (batch + 1), or null where nothing is excluded
    const int64_t* excluded_ids;    // ascending per query
};

// Scores of a block of queries in device memory, for what needs more than one pass over them. Rows are whole tiles: scores beyond the
// items are of no meaning.
struct Kept {
    float* scores;  // (batch, pitch)
    int64_t pitch;

    static constexpr int64_t pitch_of(int64_t size) { return (size + kColumns - 1) / kColumns * kColumns; }
};

// Where things lie in a block's shared memory, in bytes.
struct SharedPlan {
    int queries, ring, stage, scores, rows, total;

    static constexpr int kRowBytes = 88;  // the consumers' state of each row: RowState

    __host__ __device__ static SharedPlan of(int query_rows, int query_parts, int chunks, int stages, bool resident) {
        const int query_chunk = query_rows * query_parts * kChunkBytes;
        SharedPlan plan = {};
        plan.ring = resident ? chunks * query_chunk : 0;
        plan.stage = kItemStageBytes + (resident ? 0 : query_chunk);
        plan.scores = plan.ring + stages * plan.stage;
        plan.rows = plan.scores + query_rows * kScorePitch * 4;
        plan.total = plan.rows + query_rows * kRowBytes;
        return plan;
    }
};

}  // namespace dqe::cuda
