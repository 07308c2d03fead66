// Scoring: items stream through a ring of shared-memory stages, products of a tile land in shared memory, MaxSim folds each
// item's token columns, and a consumer takes the scores row by row. The consumers are in consumers.hpp.
#pragma once

#include "ptx.hpp"
#include "scan.hpp"

namespace dqe::cuda {

// The larger; NaN if either is.
__device__ inline float nan_max(float a, float b) { return (a > b || a != a) ? a : b; }

// A place in a block's sequence of chunks.
struct Position {
    int64_t tile, step;
    int chunk;

    __device__ void advance(const Scan& scan) {
        if (++chunk < scan.chunks) return;
        chunk = 0;
        if (++step < scan.steps) return;
        step = 0;
        tile += gridDim.y;
    }
};

// The columns of one step of one item tile.
struct ColumnTile {
    int64_t first_item;  // or first place in `gather`
    int items;
    int64_t first_token;  // of the item, where an item takes several steps
    int columns;

    __device__ ColumnTile(const Scan& scan, int64_t tile, int64_t step, int query_rows) {
        first_item = tile * scan.stride * scan.items_per_tile;
        const int64_t end = scan.gather ? query_rows : scan.size;
        items = static_cast<int>(end - first_item < scan.items_per_tile ? end - first_item : scan.items_per_tile);
        first_token = step * kColumns;
        const int64_t tokens = scan.tokens - first_token;
        columns = scan.tokens > kColumns ? static_cast<int>(tokens < kColumns ? tokens : kColumns) : items * static_cast<int>(scan.tokens);
    }

    // Where the D coordinates of column c begin.
    __device__ const unsigned char* column(const Scan& scan, int c, int element_bytes, int query_rows) const {
        int64_t token = first_item * scan.tokens + first_token + c;
        if (scan.gather) {
            const int item = scan.tokens > kColumns ? 0 : c / static_cast<int>(scan.tokens);
            const int64_t id = scan.gather[int64_t{blockIdx.x} * query_rows + first_item + item];
            token = id * scan.tokens + first_token + (c - item * scan.tokens);
        }
        return scan.items + token * scan.width * element_bytes;
    }
};

// 16 bytes of a row that is not 16-byte aligned, `bytes` of them real.
template <int ElementBytes>
__device__ uint4 load_unaligned(const unsigned char* from, int bytes) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16 / ElementBytes; ++i)
        if (i * ElementBytes < bytes) {
            if constexpr (ElementBytes == 2)
                words[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[i]} << 16 * (i % 2);
            else
                words[i] = reinterpret_cast<const uint32_t*>(from)[i];
        }
    return {words[0], words[1], words[2], words[3]};
}

// Start bringing one chunk of a column tile into a stage; beyond the columns and beyond D it is filled with zeros.
template <int ElementBytes, int Rows>
__device__ void load_items(const Scan& scan, const Position& at, Shared<unsigned char> stage) {
    const ColumnTile tile(scan, at.tile, at.step, Rows);
    const int unit = threadIdx.x % 8;
    const int64_t offset = int64_t{at.chunk} * kChunkBytes + unit * 16;
    const int64_t left = scan.width * ElementBytes - offset;
    const int inside = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
#pragma unroll
    for (int row = threadIdx.x / 8; row < kColumns; row += kThreads / 8) {
        const int bytes = row < tile.columns ? inside : 0;
        // A copy of no bytes still needs an address: that of the items.
        const unsigned char* from = bytes ? tile.column(scan, row, ElementBytes, Rows) + offset : scan.items;
        const Shared<unsigned char> to = stage + chunk_offset(row, unit);
        if (scan.aligned)
            cp_async_16(to, from, bytes);
        else
            store_uint4(to, load_unaligned<ElementBytes>(from, bytes));
    }
}

template <int QueryRows>
__device__ void load_query_chunk(const unsigned char* from, Shared<unsigned char> to) {
    for (int i = threadIdx.x; i < QueryRows * 8; i += kThreads) cp_async_16(to + chunk_offset(i / 8, i % 8), from + i * 16, 16);
}

// The score of one pair in plain f32, for where splitting a query turned an infinite coordinate into NaN (inf * 0, inf - inf).
__device__ DQE_NOINLINE inline float exact_dot(const float* query, const uint16_t* token, int64_t width) {
    float sum = 0.0f;
    for (int64_t d = 0; d < width && sum == sum; ++d) sum = fmaf(query[d], half_to_float(token[d]), sum);
    return sum;
}

// Tensor cores: 8 warps share the tile of Rows x 128, each computes (16 * kTall) x (8 * kWide).
template <Product product, int Rows>
struct Accumulators {
    static constexpr int kParts = Format<product>::query_parts;
    static constexpr int kAcross = Rows == 16 ? 8 : 4;  // warps side by side
    static constexpr int kTall = Rows / 16 * kAcross / kWarps;
    static constexpr int kWide = kColumns / 8 / kAcross;
    float value[kTall][kWide][4] = {};

    __device__ static int top(int warp) { return warp / kAcross * kTall * 16; }
    __device__ static int left(int warp) { return warp % kAcross * kWide * 8; }

    __device__ void add(Shared<unsigned char> queries, Shared<unsigned char> items) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // 16 of the chunk's 64 elements
            uint32_t b[kWide / 2][4];
#pragma unroll
            for (int n = 0; n < kWide / 2; ++n)  // 16 columns: matrices (columns 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
                ldmatrix_x4(b[n], items + chunk_offset(left(warp) + n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int m = 0; m < kTall; ++m) {  // 16 rows: matrices (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
                    uint32_t a[4];
                    ldmatrix_x4(a, queries + part * Rows * kChunkBytes + chunk_offset(top(warp) + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
                    for (int n = 0; n < kWide; ++n) mma_16x8x16(value[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                }
        }
    }

    // `open(row)` gives what takes that row's (column, value).
    template <typename Open>
    __device__ void store(const Open& open) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < kTall; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const auto put = open(top(warp) + m * 16 + lane / 4 + half * 8);
#pragma unroll
                for (int n = 0; n < kWide; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) put(left(warp) + n * 8 + lane % 4 * 2 + i, value[m][n][half * 2 + i]);
            }
    }
};

// f32 items: fused multiply-adds in f32, in order of D. A warp takes Rows / 8 queries, a lane every 32nd column.
template <int Rows>
struct Accumulators<Product::single, Rows> {
    static constexpr int kTall = Rows / kWarps;
    static constexpr int kWide = kColumns / 32;
    float value[kTall][kWide] = {};

    __device__ void add(Shared<unsigned char> queries, Shared<unsigned char> items) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 2
        for (int unit = 0; unit < 8; ++unit) {
            float4 token[kWide];
#pragma unroll
            for (int n = 0; n < kWide; ++n) token[n] = load_float4(items + chunk_offset(n * 32 + lane, unit));
#pragma unroll
            for (int m = 0; m < kTall; ++m) {
                const float4 query = load_float4(queries + chunk_offset(warp * kTall + m, unit));
#pragma unroll
                for (int n = 0; n < kWide; ++n) {
                    value[m][n] = fmaf(query.x, token[n].x, value[m][n]);
                    value[m][n] = fmaf(query.y, token[n].y, value[m][n]);
                    value[m][n] = fmaf(query.z, token[n].z, value[m][n]);
                    value[m][n] = fmaf(query.w, token[n].w, value[m][n]);
                }
            }
        }
    }

    template <typename Open>
    __device__ void store(const Open& open) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < kTall; ++m) {
            const auto put = open(warp * kTall + m);
#pragma unroll
            for (int n = 0; n < kWide; ++n) put(n * 32 + lane, value[m][n]);
        }
    }
};

// Fold the columns of each item into its first one. Rows x items pairs are spread over the threads; each starts at another of
// its columns, or items of 32 tokens would all begin in one bank.
template <int Rows>
__device__ void fold_tokens(Shared<float> scores, int items, int tokens) {
    for (int pair = threadIdx.x; pair < Rows * items; pair += kThreads) {
        const Shared<float> columns = scores + (pair / items * kScorePitch + pair % items * tokens);
        int column = pair % tokens;
        float best = columns[column];
        for (int i = 1; i < tokens; ++i) {
            column = column + 1 == tokens ? 0 : column + 1;
            best = nan_max(best, columns[column]);
        }
        columns[0] = best;
    }
}

// An item of more than 128 tokens: fold this step's columns and the steps before into the last column, which is never a token's
// (the pitch exceeds 128). Each warp keeps to its own rows.
template <int Rows>
__device__ void fold_step(Shared<float> scores, int columns, bool first, bool last) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < Rows; row += kWarps) {
        const Shared<float> line = scores + row * kScorePitch;
        float best = line[lane < columns ? lane : 0];
        for (int column = lane + 32; column < columns; column += 32) best = nan_max(best, line[column]);
        for (int distance = 16; distance > 0; distance /= 2) best = nan_max(best, __shfl_xor_sync(kAllLanes, best, distance));
        if (lane == 0) {
            if (!first) best = nan_max(best, line[kColumns]);
            line[last ? 0 : kColumns] = best;
        }
    }
}

// The whole pass of one block. `consumer.take(row, query, scores, stride, first_item, items)` is called by all lanes of the
// warp that owns the row (row % 8), once per item tile: the score of item first_item + j is scores[j * stride].
template <Product product, int Rows, typename Consumer>
__device__ void scan_items(const Scan& scan, const SharedPlan& plan, Consumer& consumer) {
    constexpr int kQueryChunk = Rows * Format<product>::query_parts * kChunkBytes;
    constexpr int kElementBytes = Format<product>::element_bytes;
    const Shared<unsigned char> shared = shared_memory();
    const Shared<float> scores = shared_view<float>(shared + plan.scores);
    const int64_t first_query = int64_t{blockIdx.x} * Rows;
    const unsigned char* queries = scan.queries + int64_t{blockIdx.x} * scan.chunks * kQueryChunk;

    const auto load = [&](const Position& at, int slot) {
        const Shared<unsigned char> stage = shared + (plan.ring + slot * plan.stage);
        load_items<kElementBytes, Rows>(scan, at, stage);
        if (!scan.resident)
            for (int part = 0; part < Format<product>::query_parts; ++part)
                load_query_chunk<Rows>(queries + at.chunk * kQueryChunk + part * Rows * kChunkBytes,
                                       stage + (kItemStageBytes + part * Rows * kChunkBytes));
    };

    if (scan.resident)  // joins the first stage's group
        for (int i = 0; i < scan.chunks * Format<product>::query_parts; ++i)
            load_query_chunk<Rows>(queries + i * Rows * kChunkBytes, shared + i * Rows * kChunkBytes);
    Position ahead = {int64_t{blockIdx.y}, 0, 0};
    for (int slot = 0; slot < scan.stages - 1; ++slot) {
        if (ahead.tile < scan.tiles) load(ahead, slot);
        cp_async_commit();
        ahead.advance(scan);
    }

    int slot = 0;
    for (int64_t tile = blockIdx.y; tile < scan.tiles; tile += gridDim.y)
        for (int64_t step = 0; step < scan.steps; ++step) {
            const ColumnTile columns(scan, tile, step, Rows);
            Accumulators<product, Rows> products;
            for (int chunk = 0; chunk < scan.chunks; ++chunk) {
                cp_async_wait_for(scan.stages - 2);
                __syncthreads();  // the chunk is there for all, and all are done with the stage that is refilled now
                if (ahead.tile < scan.tiles) load(ahead, slot == 0 ? scan.stages - 1 : slot - 1);
                cp_async_commit();  // also where nothing was loaded: the count of groups is what is waited for
                ahead.advance(scan);
                const Shared<unsigned char> stage = shared + (plan.ring + slot * plan.stage);
                products.add(scan.resident ? shared + chunk * kQueryChunk : stage + kItemStageBytes, stage);
                slot = slot + 1 == scan.stages ? 0 : slot + 1;
            }

            // The barriers above also lie between the consumers of the tile before and these stores.
            products.store([&](int row) {
                const int64_t query = first_query + row;
                const float unscale = query < scan.batch ? scan.unscale[query] : 0.0f;
                return [&, row, query, unscale](int column, float value) {
                    value *= unscale;
                    if (product == Product::split_half && value != value && query < scan.batch && unscale == unscale &&
                        column < columns.columns)
                        value = exact_dot(scan.exact_queries + query * scan.width,
                                          reinterpret_cast<const uint16_t*>(columns.column(scan, column, kElementBytes, Rows)), scan.width);
                    scores[row * kScorePitch + column] = value;
                };
            });
            __syncthreads();
            int stride = 1;
            if (scan.steps > 1) {
                fold_step<Rows>(scores, columns.columns, step == 0, step + 1 == scan.steps);
                __syncwarp();
                if (step + 1 < scan.steps) continue;
            } else if (scan.tokens > 1) {
                stride = static_cast<int>(scan.tokens);
                fold_tokens<Rows>(scores, columns.items, stride);
                __syncthreads();
            }
            for (int row = threadIdx.x / 32; row < Rows && first_query + row < scan.batch; row += kWarps)
                consumer.take(row, first_query + row, scores + row * kScorePitch, stride, columns.first_item, columns.items);
        }
    cp_async_wait<0>();
}

}  // namespace dqe::cuda
