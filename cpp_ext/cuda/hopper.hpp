// The path for devices of compute capability 9.0: what it serves, and what its kernels need of shared memory. They are in hopper_kernel.hpp
// (the scan), hopper_scores.hpp (top-k, zones, kept scores) and hopper_screen.hpp (bounds from codes), compiled for sm_90a alone
// (hopper.cu). Everything else takes the kernels of scan_kernels.hpp and screen_sieve.hpp.
//
// No device has run it yet. What was checked without one: tests/zones/test_cuda_hopper.py.
#pragma once

#include <algorithm>

#include "screen_sieve.hpp"
#include "zone_sieve.hpp"

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
constexpr int kNumberBytes = 3 * kColumns * 4;  // scales, errors and norms of a tile of codes

// Shared memory of a block, in bytes: prepared queries, the ring, numbers for each stage, queues for each warp of the consumers, bounds for
// each row, mbarriers.
struct HopperPlan {
    int rows;  // of a query tile: 64 of codes, else 128 or 256; 0 where this path does not serve
    int parts, chunks;
    int numbers, queue;  // bytes of a stage beside its chunk, and of a warp's queues
    int bounds;          // bytes of a row
    int blocks;          // on a multiprocessor
    int stages;

    __host__ __device__ int query_chunk() const { return rows * parts * kChunkBytes; }
    __host__ __device__ int ring() const { return chunks * query_chunk(); }
    __host__ __device__ int beside() const { return ring() + stages * kItemStageBytes; }
    __host__ __device__ int queues() const { return beside() + stages * numbers; }
    __host__ __device__ int row_bounds() const { return queues() + kWarps * queue; }
    __host__ __device__ int barriers() const { return row_bounds() + rows * bounds; }
    __host__ __device__ int bytes() const { return barriers() + (2 * stages + 1) * 8; }

    // As many stages as fit; false if they are too few.
    bool fit(int shared_limit) {
        for (stages = kMostStages; stages > 0 && bytes() > shared_limit;) --stages;
        return stages >= kFewestStages;
    }
};

// Whether the current device runs these kernels at all.
inline bool on_hopper() {
    int device = 0, major = 0, minor = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    if (!known) cudaGetLastError();  // whoever starts something meets it again
    return known && major == 9 && minor == 0;
}

// Whether TMA can read the rows, and columns are whole items: 16-byte pitch and base, coordinates of 31 bits, a power of two of tokens. And
// whether the plan's bytes can be computed without overflow.
inline bool hopper_reads(int64_t size, int64_t tokens, int parts, int chunks, int unit) {
    constexpr int64_t kMostColumns = (int64_t{1} << 31) - kColumns;
    return unit == 16 && tokens >= 1 && tokens <= kColumns && kColumns % tokens == 0 && size * tokens <= kMostColumns &&
           static_cast<int64_t>(chunks) * 256 * parts * kChunkBytes <= (1 << 20);
}

// For a request, the plan; `rows` is 0 where the request takes the other kernels. It serves f16 items and queries that fit shared memory
// whole. A block of more than 128 queries gets tiles of 256, so that items are read half as often. `sieves_zones`: zones are found in
// registers, beside the best.
inline HopperPlan hopper_plan(int64_t batch, int64_t size, int64_t tokens, int parts, int chunks, int unit, bool sieves_zones,
                              int shared_limit) {
    if (!hopper_reads(size, tokens, parts, chunks, unit)) return {};
    HopperPlan plan = {256, parts, chunks, 0, kQueueBytes, 0, 1, 0};
    if (sieves_zones) plan.queue = 2 * kQueueBytes, plan.bounds = kBoundsBytes;
    if (batch > 128 && parts == 1 && plan.fit(shared_limit)) return plan;
    plan.rows = 128;
    return plan.fit(shared_limit) ? plan : HopperPlan{};
}

// The same for the pass over the codes, of `chunks` chunks: two blocks on a multiprocessor if their queries leave room, since the warps of
// one wait for each other's instructions too often.
inline HopperPlan hopper_screen_plan(int64_t size, int64_t tokens, int chunks, const CodedItems& items, int shared_limit,
                                     int shared_total) {
    if (!hopper_reads(size, tokens, 1, chunks, 16) || items.numbers_pitch() == 0) return {};
    HopperPlan plan = {64, 1, chunks, kNumberBytes, kBoundQueueBytes, 0, 2, 0};
    if (plan.fit(std::min(shared_limit, shared_total / 2 - 1024))) return plan;
    plan.blocks = 1;
    return plan.fit(shared_limit) ? plan : HopperPlan{};
}

// Start a pass: Sieve's or its sample, one that keeps scores, one that sieves zones (beside the best, if these are wanted).
template <typename Argument>
using HopperLaunch = cudaError_t(const HopperPlan& plan, const Scan& scan, const Argument& argument, int processors, cudaStream_t stream);
HopperLaunch<Candidates> launch_hopper_top, launch_hopper_sample;
HopperLaunch<Keeping> launch_hopper_keep;
HopperLaunch<Selection> launch_hopper_zones;

// Start the pass over the codes; `rows`: of the query tiles that pairs are written down for, a divisor of 64.
cudaError_t launch_hopper_screen(const HopperPlan& plan, const Scan& coded, const Screening& screening, int rows, int processors,
                                 cudaStream_t stream);

}  // namespace dqe::cuda
