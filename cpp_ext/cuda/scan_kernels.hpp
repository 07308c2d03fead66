// The kernels that pass over the items: what a block keeps where, and who takes its scores.
#pragma once

#include "kept.hpp"
#include "score_tile.hpp"
#include "screen_sieve.hpp"
#include "zone_sieve.hpp"

namespace dqe::cuda {

template <template <int> class Consumer, typename Argument, Product product, int Rows>
__global__ __launch_bounds__(kThreads, 1) void scan_kernel(Scan scan, Argument argument) {
    admit_next();
    await_previous();
    const SharedPlan plan = SharedPlan::of(Rows, Format<product>::query_parts, scan.chunks, scan.stages, scan.resident);
    if constexpr (std::is_same_v<Argument, Gathering>) Consumer<Rows>::shorten(scan, argument);
    Consumer<Rows> consumer(scan, argument, shared_memory() + plan.rows);
    scan_items<product, Rows>(scan, plan, consumer);
    consumer.end();
}

// Two blocks on a multiprocessor, where shared memory allows: a warp waits between instructions for longer than the others need.
template <Product product, int Rows, bool Sampling>
__global__ __launch_bounds__(kThreads, 2) void sieve_kernel(Scan scan, Candidates list) {
    admit_next();
    await_previous();
    constexpr int kStages = sieve_stages(Rows, Format<product>::query_parts, false);
    const int ring = static_cast<int>(sieve_ring(Rows, Format<product>::query_parts, scan.chunks));
    Sieve<Accumulators<product, Rows>> sieve(scan, list, true, shared_memory() + (ring + kStages * kItemStageBytes));
    multiply_items<product, Rows, true, kStages>(scan, ring, kItemStageBytes,
                                                 [&](const ColumnTile& columns, int64_t, const Accumulators<product, Rows>& products) {
                                                     if constexpr (Sampling)
                                                         sieve.sample(columns, products);
                                                     else
                                                         sieve.take(columns, products);
                                                 });
    if constexpr (!Sampling) sieve.end();
}

template <Product product, int Rows>
__global__ __launch_bounds__(kThreads, 2) void keep_kernel(Scan scan, Keeping keeping) {
    admit_next();
    await_previous();
    constexpr int kStages = sieve_stages(Rows, Format<product>::query_parts, false);
    const int ring = static_cast<int>(sieve_ring(Rows, Format<product>::query_parts, scan.chunks));
    Sieve<Accumulators<product, Rows>> sieve(scan, keeping.selection.top, keeping.selection.want_top,
                                             shared_memory() + (ring + kStages * kItemStageBytes));
    multiply_items<product, Rows, true, kStages>(scan, ring, kItemStageBytes,
                                                 [&](const ColumnTile& columns, int64_t, const Accumulators<product, Rows>& products) {
                                                     sieve.keep(columns, products, keeping.kept);
                                                 });
    sieve.end();
}

constexpr int zone_blocks(Product product, int rows) { return product == Product::split_half && rows == 64 ? 1 : 2; }

template <Product product, int Rows>
__global__ __launch_bounds__(kThreads, zone_blocks(product, Rows)) void zone_kernel(Scan scan, Selection selection) {
    admit_next();
    await_previous();
    constexpr int kStages = sieve_stages(Rows, Format<product>::query_parts, true);
    const int ring = static_cast<int>(sieve_ring(Rows, Format<product>::query_parts, scan.chunks));
    const int queues = ring + kStages * kItemStageBytes;
    const Shared<unsigned char> bounds = shared_memory() + (queues + 2 * kWarps * kQueueBytes);
    using Zones = ZoneSieve<Accumulators<product, Rows>>;
    Zones::fill(scan, selection, bounds);
    Sieve<Accumulators<product, Rows>> sieve(scan, selection.top, selection.want_top, shared_memory() + queues);
    Zones zones(scan, selection, shared_memory() + (queues + kWarps * kQueueBytes), bounds);
    multiply_items<product, Rows, true, kStages>(scan, ring, kItemStageBytes,
                                                 [&](const ColumnTile& columns, int64_t, Accumulators<product, Rows>& products) {
                                                     zones.take(columns, products);
                                                     if (selection.want_top) sieve.take_scores(columns, products);
                                                 });
    sieve.end();
    zones.end();
}

}  // namespace dqe::cuda
