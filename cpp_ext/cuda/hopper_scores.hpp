// The passes on sm_90a that give scores: the best of them and their sample, zones, and scores that are kept. One instruction, in one order,
// gives all scores of a request, those of its anchors too (see `score_anchors`), so that what they are compared with means the same.
#pragma once

#include "hopper_kernel.hpp"

namespace dqe::cuda {

template <Product product, int Tall, bool Sampling>
__global__ __launch_bounds__(kHopperThreads, 1) void hopper_kernel(const __grid_constant__ TensorMap items,
                                                                   const __grid_constant__ TensorMap queries, HopperPlan plan, Scan scan,
                                                                   Candidates list) {
    using Products = WarpgroupProducts<product, Tall>;
    const HopperBarriers barriers = {shared_address(shared_memory()) + plan.barriers(), plan.stages};
    divide<kProducerRegisters, kConsumerRegisters>(
        barriers, [&] { bring(plan, barriers, items, queries, nullptr, scan); },
        [&] {
            Sieve<Products> sieve(scan, list, true, shared_memory() + plan.queues());
            multiply<Products, false>(plan, barriers, scan, [&](const ColumnTile& columns, const Products& products, int) {
                if constexpr (Sampling)
                    sieve.sample(columns, products);
                else
                    sieve.take(columns, products);
            });
            if constexpr (!Sampling) sieve.end();
        });
}

template <Product product, int Tall>
__global__ __launch_bounds__(kHopperThreads, 1) void hopper_keep_kernel(const __grid_constant__ TensorMap items,
                                                                        const __grid_constant__ TensorMap queries, HopperPlan plan,
                                                                        Scan scan, Keeping keeping) {
    using Products = WarpgroupProducts<product, Tall>;
    const HopperBarriers barriers = {shared_address(shared_memory()) + plan.barriers(), plan.stages};
    divide<kProducerRegisters, kConsumerRegisters>(
        barriers, [&] { bring(plan, barriers, items, queries, nullptr, scan); },
        [&] {
            Sieve<Products> sieve(scan, keeping.selection.top, keeping.selection.want_top, shared_memory() + plan.queues());
            multiply<Products, false>(plan, barriers, scan, [&](const ColumnTile& columns, const Products& products, int) {
                sieve.keep(columns, products, keeping.kept);
            });
            sieve.end();
        });
}

template <Product product, int Tall>
__global__ __launch_bounds__(kHopperThreads, 1) void hopper_zone_kernel(const __grid_constant__ TensorMap items,
                                                                        const __grid_constant__ TensorMap queries, HopperPlan plan,
                                                                        Scan scan, Selection selection) {
    using Products = WarpgroupProducts<product, Tall>;
    const HopperBarriers barriers = {shared_address(shared_memory()) + plan.barriers(), plan.stages};
    ZoneSieve<Products>::fill(scan, selection, shared_memory() + plan.row_bounds());  // a barrier follows
    divide<kProducerRegisters, kConsumerRegisters>(
        barriers, [&] { bring(plan, barriers, items, queries, nullptr, scan); },
        [&] {
            const Shared<unsigned char> queues = shared_memory() + plan.queues();
            Sieve<Products> sieve(scan, selection.top, selection.want_top, queues);
            ZoneSieve<Products> zones(scan, selection, queues + kWarps * kQueueBytes, shared_memory() + plan.row_bounds());
            multiply<Products, false>(plan, barriers, scan, [&](const ColumnTile& columns, Products& products, int) {
                zones.take(columns, products);
                if (selection.want_top) sieve.take_scores(columns, products);
            });
            sieve.end();
            zones.end();
        });
}

}  // namespace dqe::cuda
