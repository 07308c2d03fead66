// Top-k candidates on sm_90a: one thread brings items by TMA, two warpgroups multiply them (wgmma) and sieve the scores in their registers.
//
//     producer     wait empty[s] | expect, copy a chunk of 128 columns x 64 elements -> stage s, full[s]
//     consumers    wait full[s]  | products of 64 or 128 query rows each, arrive at empty[s] | after the last chunk of a tile: Sieve
//
// A block keeps one query tile in shared memory and walks over item tiles; both consumer warpgroups read the same stage for rows of their
// own, so one sieves while the other multiplies. Each of their warps arrives at empty[s] once its own products have read the stage.
#pragma once

#include "hopper.hpp"
#include "hopper_ptx.hpp"

namespace dqe::cuda {

// Registers a thread. A block is launched with 168 for each (65,536 over 384 threads, in eights); the producer hands its own on.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumerGroups * kConsumerRegisters <= (1 + kConsumerGroups) * (65536 / kHopperThreads / 8 * 8));

// A stage of the ring, and the parity of the round that is under way there.
struct RingPlace {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

struct HopperBarriers {
    uint32_t base;
    int stages;
    __device__ uint32_t full(int stage) const { return base + stage * 8; }
    __device__ uint32_t empty(int stage) const { return base + (stages + stage) * 8; }
    __device__ uint32_t queries() const { return base + 2 * stages * 8; }
};

// A consumer warpgroup's scores of one item tile: Tall times 64 rows by 128 columns. Laid out for Lane, like Accumulators.
template <Product product, int Tall>
struct WarpgroupProducts {
    static constexpr Product kProduct = product;
    static constexpr int kParts = Format<product>::query_parts;
    static constexpr int kRows = kConsumerGroups * Tall * 64;  // of the block
    static constexpr int kTall = Tall, kWide = kColumns / 8, kAcross = kHopperAcross;
    float value[kTall][kWide][4];

    __device__ static int left(int) { return 0; }
    __device__ static int row_of(int warp, int group) { return (warp / 4 * kTall + group / 2) * 64 + warp % 4 * 16 + group % 2 * 8; }

    // Start the products of a chunk; `queries` and `items` say where in shared memory it lies.
    __device__ void add(uint32_t queries, uint32_t items, bool first_chunk) {
        const uint64_t query = wgmma_descriptor(queries + threadIdx.x / kWarpgroup * kTall * 64 * kChunkBytes);
        const uint64_t item = wgmma_descriptor(items);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)  // 16 of the chunk's 64 elements
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int m = 0; m < kTall; ++m)
                    wgmma_64x128x16(value[m], query + 2 * k + ((part * kRows + m * 64) * kChunkBytes >> 4), item + 2 * k,
                                    !first_chunk || k || part);
        wgmma_commit();
    }

    __device__ void settle() {
#pragma unroll
        for (auto& tile : value)
#pragma unroll
            for (auto& four : tile)
#pragma unroll
                for (float& one : four) wgmma_settled(one);
    }
};

__device__ inline void bring(const HopperPlan& plan, const HopperBarriers& barriers, const TensorMap& items, const TensorMap& queries,
                             const Scan& scan) {
    const uint32_t shared = shared_address(shared_memory());
    mbarrier_expect(barriers.queries(), plan.ring());
#pragma unroll 1
    for (int i = 0; i < plan.chunks * plan.parts; ++i)
        copy_box(shared + i * plan.rows * kChunkBytes, queries, barriers.queries(), 0,
                 (static_cast<int>(blockIdx.x) * plan.chunks * plan.parts + i) * plan.rows);
    RingPlace at;
    for (int64_t tile = blockIdx.y; tile < scan.tiles; tile += gridDim.y) {
        const int column = static_cast<int>(tile * scan.stride * kColumns);
        for (int chunk = 0; chunk < plan.chunks; ++chunk, at.advance(plan.stages)) {
            mbarrier_wait(barriers.empty(at.stage), at.parity ^ 1);
            mbarrier_expect(barriers.full(at.stage), kItemStageBytes);
            copy_box(shared + plan.ring() + at.stage * kItemStageBytes, items, barriers.full(at.stage), chunk * (kChunkBytes / 2), column);
        }
    }
}

template <typename Products, typename Visit>
__device__ void multiply(const HopperPlan& plan, const HopperBarriers& barriers, const Scan& scan, const Visit& visit) {
    const uint32_t shared = shared_address(shared_memory());
    const auto release = [&](int stage) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers.empty(stage));
    };
    mbarrier_wait(barriers.queries(), 0);
    RingPlace at;
    for (int64_t tile = blockIdx.y; tile < scan.tiles; tile += gridDim.y) {
        Products products;
        int unfinished = 0;  // the stage of the products before
        for (int chunk = 0; chunk < plan.chunks; ++chunk, at.advance(plan.stages)) {
            mbarrier_wait(barriers.full(at.stage), at.parity);
            products.add(shared + chunk * plan.query_chunk(), shared + plan.ring() + at.stage * kItemStageBytes, chunk == 0);
            if (chunk > 0) {
                wgmma_wait<1>();
                release(unfinished);
            }
            unfinished = at.stage;
        }
        wgmma_wait<0>();
        release(unfinished);
        products.settle();
        visit(ColumnTile(scan, tile, 0), products);
    }
}

template <Product product, int Tall, bool Sampling>
__global__ __launch_bounds__(kHopperThreads, 1) void hopper_kernel(const __grid_constant__ TensorMap items,
                                                                   const __grid_constant__ TensorMap queries, HopperPlan plan, Scan scan,
                                                                   Candidates list) {
    using Products = WarpgroupProducts<product, Tall>;
    const HopperBarriers barriers = {shared_address(shared_memory()) + plan.barriers(), plan.stages};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < plan.stages; ++stage) {
            mbarrier_init(barriers.full(stage), 1);
            mbarrier_init(barriers.empty(stage), kWarps);
        }
        mbarrier_init(barriers.queries(), 1);
        mbarrier_publish();
    }
    __syncthreads();
    if (threadIdx.x >= kThreads) {
        lower_registers<kProducerRegisters>();
        if (threadIdx.x == kThreads) bring(plan, barriers, items, queries, scan);
        return;
    }
    raise_registers<kConsumerRegisters>();
    Sieve<Products> sieve(scan, list, true, shared_memory() + plan.queues());
    multiply<Products>(plan, barriers, scan, [&](const ColumnTile& columns, const Products& products) {
        if constexpr (Sampling)
            sieve.sample(columns, products);
        else
            sieve.take(columns, products);
    });
    if constexpr (!Sampling) sieve.end();
}

}  // namespace dqe::cuda
