// Scoring: items stream through a ring of shared-memory stages, products of a tile land in shared memory, MaxSim folds each
// item's token columns, and a consumer takes the scores row by row. The consumers are in consumers.hpp.
#pragma once

#include <type_traits>

#include "producer.hpp"
#include "ptx.hpp"
#include "scan.hpp"

namespace dqe::cuda {

template <int QueryRows>
__device__ void load_query_chunk(const unsigned char* from, uint32_t to) {
    for (int i = threadIdx.x; i < QueryRows * 8; i += kThreads) cp_async_16(to + chunk_offset(i / 8, i % 8), from + i * 16, 16);
}

// The score of one pair in plain f32, for where splitting a query turned an infinite coordinate into NaN (inf * 0, inf - inf).
__device__ DQE_NOINLINE inline float exact_dot(const float* query, const uint16_t* token, int64_t width) {
    float sum = 0.0f;
    for (int64_t d = 0; d < width && sum == sum; ++d) sum = fmaf(query[d], half_to_float(token[d]), sum);
    return sum;
}

// A product as a score. `query` is the row's, `unscale` its scale.
template <Product product, int Rows>
__device__ float score_of(const Scan& scan, const ColumnTile& columns, float value, float unscale, int64_t query, int column) {
    if constexpr (product != Product::split_half) return value;
    value *= unscale;
    if (value != value && unscale == unscale && query < scan.batch && column < columns.columns)
        value = exact_dot(scan.exact_queries + query * scan.width, reinterpret_cast<const uint16_t*>(columns.column(scan, column, 2)),
                          scan.width);
    return value;
}

// Tensor cores: 8 warps share the tile of Rows x 128, each computes (16 * kTall) x (8 * kWide).
template <Product product, int Rows>
struct Accumulators {
    static constexpr Product kProduct = product;
    static constexpr int kRows = Rows;
    static constexpr int kParts = Format<product>::query_parts;
    static constexpr int kAcross = Rows == 16 ? 8 : 4;  // warps side by side
    static constexpr int kTall = Rows / 16 * kAcross / kWarps;
    static constexpr int kWide = kColumns / 8 / kAcross;
    using Value = std::conditional_t<product == Product::codes, int, float>;
    Value value[kTall][kWide][4] = {};

    __device__ static int top(int warp) { return warp / kAcross * kTall * 16; }
    __device__ static int left(int warp) { return warp % kAcross * kWide * 8; }
    __device__ static int row_of(int warp, int group) { return top(warp) + group * 8; }  // of a group's first lane

    // `queries` and `items` say where in shared memory the chunk's operands lie, in bytes; both are multiples of 128. Going 16
    // elements on adds 2 to a row's unit, whose lowest bit is the lane's alone: under the swizzle that flips bits of the address.
    __device__ void add(int queries, int items) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint32_t base = shared_address(shared_memory());
        const uint32_t query = base + queries + chunk_offset(top(warp) + lane % 16, lane / 16);
        const uint32_t item = base + items + chunk_offset(left(warp) + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // 32 bytes: 16 of the chunk's 64 elements, or 32 codes
            uint32_t b[kWide / 2][4];
#pragma unroll
            for (int n = 0; n < kWide / 2; ++n)  // 16 columns: matrices (columns 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
                ldmatrix_x4(b[n], (item ^ k << 5) + n * 16 * kChunkBytes);
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int m = 0; m < kTall; ++m) {  // 16 rows: matrices (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
                    uint32_t a[4];
                    ldmatrix_x4(a, (query ^ k << 5) + (part * Rows + m * 16) * kChunkBytes);
#pragma unroll
                    for (int n = 0; n < kWide; ++n) {
                        const uint32_t b0 = b[n / 2][n % 2 * 2], b1 = b[n / 2][n % 2 * 2 + 1];
                        if constexpr (product == Product::codes)  // bytes lie in fragments as pairs of them do
                            mma_16x8x32(value[m][n], a, b0, b1);
                        else
                            mma_16x8x16(value[m][n], a, b0, b1);
                    }
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

    __device__ void add(int queries_at, int items_at) {
        const Shared<unsigned char> queries = shared_memory() + queries_at, items = shared_memory() + items_at;
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
        __syncwarp();  // all have read; their values are in `best` already, but a shuffle promises no order of memory accesses
        if (lane == 0) {
            if (!first) best = nan_max(best, line[kColumns]);
            line[last ? 0 : kColumns] = best;
        }
    }
}

// The products of a block's tiles, one after another: `visit(columns, step, products)` for each step of each tile. The barriers
// of the next step's chunks lie between what one call of `visit` reads of shared memory and what the next one writes.
//
// Stages: their number, or 0 where only `scan` knows it. Plain: see Producer; and the queries stay in shared memory.
template <Product product, int Rows, bool Plain, int Stages, typename Visit>
__device__ void multiply_items(const Scan& scan, int ring, int stage_bytes, const Visit& visit) {
    constexpr int kParts = Format<product>::query_parts, kQueryChunk = Rows * kParts * kChunkBytes;
    const uint32_t shared = shared_address(shared_memory());
    const unsigned char* queries = scan.queries + int64_t{blockIdx.x} * scan.chunks * kQueryChunk;
    const bool resident = Plain || scan.resident;
    const int stages = Stages ? Stages : scan.stages, past = ring + stages * stage_bytes;
    Producer<Format<product>::element_bytes, Plain> producer(scan);

    const auto load = [&](int stage) {
        if (producer.more()) {
            producer.load(stage);
            if (!resident)
                for (int part = 0; part < kParts; ++part)
                    load_query_chunk<Rows>(queries + producer.chunk() * kQueryChunk + part * Rows * kChunkBytes,
                                           shared + stage + kItemStageBytes + part * Rows * kChunkBytes);
            producer.advance();
        }
        cp_async_commit();  // also where nothing was loaded: the count of groups is what is waited for
    };

    if (resident)  // joins the first stage's group
        for (int i = 0; i < scan.chunks * kParts; ++i)
            load_query_chunk<Rows>(queries + i * Rows * kChunkBytes, shared + i * Rows * kChunkBytes);
    int free = ring, next = ring;  // the stage to fill, the stage to use
    const auto behind = [&](int stage) { return stage + stage_bytes == past ? ring : stage + stage_bytes; };
    for (; free + stage_bytes < past; free += stage_bytes) load(free);

    for (int64_t tile = blockIdx.y; tile < scan.tiles; tile += gridDim.y)
        for (int64_t step = 0; step < (Plain ? 1 : scan.steps); ++step) {
            Accumulators<product, Rows> products;
            for (int chunk = 0; chunk < scan.chunks; ++chunk) {
                if constexpr (Stages)
                    cp_async_wait<Stages - 2>();
                else
                    cp_async_wait_for(stages - 2);
                __syncthreads();  // the chunk is there for all, and all are done with the stage that is refilled now
                load(free);
                free = behind(free);
                products.add(resident ? chunk * kQueryChunk : next + kItemStageBytes, next);
                next = behind(next);
            }
            visit(ColumnTile(scan, tile, step), step, products);
        }
    cp_async_wait<0>();
}

// The whole pass of one block. `consumer.take(row, query, scores, stride, first_item, items)` is called by all lanes of the
// warp that owns the row (row % 8), once per item tile: the score of item first_item + j is scores[j * stride].
template <Product product, int Rows, typename Consumer>
__device__ void scan_items(const Scan& scan, const SharedPlan& plan, Consumer& consumer) {
    const Shared<float> scores = shared_view<float>(shared_memory() + plan.scores);
    const int64_t first_query = int64_t{blockIdx.x} * Rows;
    multiply_items<product, Rows, false, 0>(
        scan, plan.ring, plan.stage, [&](const ColumnTile& columns, int64_t step, const Accumulators<product, Rows>& products) {
            products.store([&](int row) {
                const int64_t query = first_query + row;
                const float unscale = query < scan.batch ? scan.unscale[query] : 0.0f;
                return [&, row, query, unscale](int column, float value) {
                    scores[row * kScorePitch + column] = score_of<product, Rows>(scan, columns, value, unscale, query, column);
                };
            });
            __syncthreads();
            int stride = 1;
            if (scan.steps > 1) {
                fold_step<Rows>(scores, columns.columns, step == 0, step + 1 == scan.steps);
                __syncwarp();
                if (step + 1 < scan.steps) return;
            } else if (scan.tokens > 1) {
                stride = static_cast<int>(scan.tokens);
                fold_tokens<Rows>(scores, columns.items, stride);
                __syncthreads();
            }
            for (int row = threadIdx.x / 32; row < Rows && first_query + row < scan.batch; row += kWarps)
                consumer.take(row, first_query + row, scores + row * kScorePitch, stride, columns.first_item, columns.items);
        });
}

}  // namespace dqe::cuda
