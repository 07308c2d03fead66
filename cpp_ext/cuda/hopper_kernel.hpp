// Passes on sm_90a: one thread brings items by TMA, two warpgroups multiply them (wgmma) and sieve the scores in their registers.
//
//     producers    one: await the kernel ahead | copy the queries; the other:
//                  wait empty[s] | expect, copy a chunk of 128 columns x 128 bytes -> stage s, full[s]
//     consumers    wait full[s]  | products, arrive at empty[s] | after the last chunk of a tile: Sieve or ScreenSieve
//
// A block keeps one query tile in shared memory and walks over item tiles. Both consumer warpgroups read the same stage. For scores each
// has 64 or 128 rows of its own, so one sieves while the other multiplies; for bounds, which few queries ask for, they share 64 rows and
// have half of the columns each. Each of their warps arrives at empty[s] once its own products have read the stage; for bounds the last
// chunk of a tile comes with the tile's numbers, and its stage is given back once these are read too.
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

// A consumer warpgroup's products of one item tile. Laid out for Lane, like Accumulators. The warpgroups have Tall times 64 rows each and
// all of the 128 columns, or where `Across` is 2 the same rows and half of the columns each.
template <Product product, int Tall, int Across = 1>
struct WarpgroupProducts {
    static_assert(Across == (product == Product::codes ? 2 : 1));  // as the instructions are that there are wrappers for
    static constexpr Product kProduct = product;
    static constexpr int kParts = Format<product>::query_parts;
    static constexpr int kRows = kConsumerGroups / Across * Tall * 64;  // of the block
    static constexpr int kTall = Tall, kWide = kColumns / 8 / Across, kAcross = Across;
    using Value = std::conditional_t<product == Product::codes, int, float>;
    Value value[kTall][kWide][4];

    __device__ static int left(int warp) { return Across == 2 ? warp / 4 * kWide * 8 : 0; }
    __device__ static int row_of(int warp, int group) {
        return ((Across == 2 ? 0 : warp / 4 * kTall) + group / 2) * 64 + warp % 4 * 16 + group % 2 * 8;
    }

    // Start the products of a chunk; `queries` and `items` say where in shared memory it lies.
    __device__ void add(uint32_t queries, uint32_t items, bool first_chunk) {
        const uint32_t group = threadIdx.x / kWarpgroup;
        const uint64_t query = wgmma_descriptor(queries + (Across == 2 ? 0 : group * kTall * 64 * kChunkBytes));
        const uint64_t item = wgmma_descriptor(items + (Across == 2 ? group * kWide * 8 * kChunkBytes : 0));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)  // 32 bytes of the chunk's 128
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int m = 0; m < kTall; ++m) {
                    const uint64_t rows = query + 2 * k + ((part * kRows + m * 64) * kChunkBytes >> 4);
                    const bool more = !first_chunk || k || part;
                    if constexpr (product == Product::codes)
                        wgmma_64x64x32(value[m], rows, item + 2 * k, more);
                    else
                        wgmma_64x128x16(value[m], rows, item + 2 * k, more);
                }
        wgmma_commit();
    }

    __device__ void settle() {
#pragma unroll
        for (auto& tile : value)
#pragma unroll
            for (auto& four : tile)
#pragma unroll
                for (Value& one : four) wgmma_settled(one);
    }
};

// By two threads: one brings the queries, once the kernel ahead has prepared them, while the other fills the ring with items, which were
// there before any kernel of the search started. `numbers`: null where there are none.
__device__ __forceinline__ void bring(const HopperPlan& plan, const HopperBarriers& barriers, const TensorMap& items,
                                      const TensorMap& queries, const TensorMap* numbers, const Scan& scan) {
    const uint32_t shared = shared_address(shared_memory());
    if (threadIdx.x != kThreads) {
        await_previous();
        mbarrier_expect(barriers.queries(), plan.ring());
#pragma unroll 1
        for (int i = 0; i < plan.chunks * plan.parts; ++i)
            copy_box(shared + i * plan.rows * kChunkBytes, queries, barriers.queries(), 0,
                     (static_cast<int>(blockIdx.x) * plan.chunks * plan.parts + i) * plan.rows);
        return;
    }
    RingPlace at;
    for (int64_t tile = blockIdx.y; tile < scan.tiles; tile += gridDim.y) {
        const int column = static_cast<int>(tile * scan.stride * kColumns);
        for (int chunk = 0; chunk < plan.chunks; ++chunk, at.advance(plan.stages)) {
            const bool numbered = numbers && chunk + 1 == plan.chunks;
            mbarrier_wait(barriers.empty(at.stage), at.parity ^ 1);
            mbarrier_expect(barriers.full(at.stage), kItemStageBytes + (numbered ? kNumberBytes : 0));
            copy_box(shared + plan.ring() + at.stage * kItemStageBytes, items, barriers.full(at.stage), chunk * kChunkBytes, column);
            if (numbered) copy_box(shared + plan.beside() + at.stage * kNumberBytes, *numbers, barriers.full(at.stage), column, 0);
        }
    }
}

// `visit(columns, products, stage)` for each tile. Held: it still reads what lies beside that stage.
template <typename Products, bool Held, typename Visit>
__device__ __forceinline__ void multiply(const HopperPlan& plan, const HopperBarriers& barriers, const Scan& scan, const Visit& visit) {
    const uint32_t shared = shared_address(shared_memory());
    const auto release = [&](int stage) {
        if (Held) __syncwarp();  // all lanes have read
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
        if (!Held) release(unfinished);
        products.settle();
        visit(ColumnTile(scan, tile, 0), products, unfinished);
        if (Held) release(unfinished);
    }
}

// The block's barriers, and their roles to its threads: `produce()` for one of each of two warps, `consume()` for those of two warpgroups.
template <int ProducerRegisters, int ConsumerRegisters, typename Produce, typename Consume>
__device__ __forceinline__ void divide(const HopperBarriers& barriers, const Produce& produce, const Consume& consume) {
    admit_next();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < barriers.stages; ++stage) {
            mbarrier_init(barriers.full(stage), 1);
            mbarrier_init(barriers.empty(stage), kWarps);
        }
        mbarrier_init(barriers.queries(), 1);
        mbarrier_publish();
    }
    __syncthreads();
    if (threadIdx.x >= kThreads) {
        lower_registers<ProducerRegisters>();
        if (threadIdx.x == kThreads || threadIdx.x == kThreads + 32) produce();
    } else {
        raise_registers<ConsumerRegisters>();
        await_previous();
        consume();
    }
}

}  // namespace dqe::cuda
