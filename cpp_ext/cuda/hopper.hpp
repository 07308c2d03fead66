// The path for devices of compute capability 9.0: what it serves, and what its kernel needs of shared memory. The kernel is in
// hopper_kernel.hpp, compiled for sm_90a alone (hopper.cu). Everything else takes the kernels of scan_kernels.hpp.
//
// No device has run it yet. What was checked without one: tests/zones/test_cuda_hopper.py.
#pragma once

#include "sieve.hpp"

namespace dqe::cuda {

#ifdef DQE_HOPPER
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumerGroups = kThreads / kWarpgroup;
constexpr int kHopperThreads = kThreads + kWarpgroup;  // the producer's warpgroup comes last
constexpr int kHopperAcross = 1;                       // warps that share a row's columns of a tile
constexpr int kFewestStages = 3;

// Shared memory of a block, in bytes: prepared queries, the ring, a queue for each warp of the consumers, mbarriers.
struct HopperPlan {
    int rows;  // of a query tile: 128 or 256; 0 where this path does not serve
    int parts, chunks, stages;

    __host__ __device__ int query_chunk() const { return rows * parts * kChunkBytes; }
    __host__ __device__ int ring() const { return chunks * query_chunk(); }
    __host__ __device__ int queues() const { return ring() + stages * kItemStageBytes; }
    __host__ __device__ int barriers() const { return queues() + kWarps * kQueueBytes; }
    __host__ __device__ int bytes() const { return barriers() + (2 * stages + 1) * 8; }

    // As many stages as fit; false if they are too few.
    bool fit(int shared_limit) {
        for (stages = kMostStages; stages > 0 && bytes() > shared_limit;) --stages;
        return stages >= kFewestStages;
    }
};

// For a request, the plan; `rows` is 0 where the request takes the other kernels. It serves top-k without zones, of f16 items whose rows
// TMA can read (16-byte pitch and base, coordinates of 31 bits), a power of two of tokens up to 128, and queries that fit shared memory
// whole. A block of more than 128 queries gets tiles of 256, so that items are read half as often.
inline HopperPlan hopper_plan(int64_t batch, int64_t size, int64_t tokens, int parts, int chunks, int unit, int shared_limit) {
    constexpr int64_t kMostColumns = (int64_t{1} << 31) - kColumns;
    const HopperPlan none = {};
    if (unit != 16 || tokens < 1 || tokens > kColumns || kColumns % tokens || size * tokens > kMostColumns) return none;
    if (static_cast<int64_t>(chunks) * 256 * parts * kChunkBytes > (1 << 20)) return none;  // before bytes() could overflow
    HopperPlan plan = {256, parts, chunks, 0};
    if (batch > 128 && parts == 1 && plan.fit(shared_limit)) return plan;
    plan.rows = 128;
    return plan.fit(shared_limit) ? plan : none;
}

// Start the pass; `sampling` as in Sieve::sample.
cudaError_t launch_hopper(const HopperPlan& plan, const Scan& scan, const Candidates& list, bool sampling, int processors,
                          cudaStream_t stream);

}  // namespace dqe::cuda
