// Test only: enough of CUDA's execution model, in plain C++, to run the kernels' own sources on a CPU and to catch what a
// GPU would not forgive.
//
// The threads of a block are fibers, each running until it waits; blocks run one after another. Caught, as a failed launch
// with a message: threads at different barriers or gone while others wait; warp operations that not all lanes reach; shared
// memory read before it is written, while an asynchronous copy is under way, or out of bounds; two threads touching a word
// between two barriers, one of them writing (unless they are of one warp and a warp operation lies between).
// What is asynchronous on sm_90a is in host_hopper.hpp.
// Not modelled: the memory system's weaker ordering, launch limits, timing. `order` permutes the threads and blocks: results
// must not depend on it.
#pragma once

#include "host_block.hpp"
#include "host_runtime.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DQE_NOINLINE

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint4 {
    uint32_t x, y, z, w;
};

namespace emulation {

struct ThreadIndex {
    struct Axis {
        operator unsigned() const { return machine.current; }
    } x;
};

template <typename T, typename Source>
T shuffled(int line, T value, const Source& source) {
    struct Lane {
        T in, out;
    } mine = {value, value};
    collective<Lane>(line, mine, [&](Lane*(&lanes)[kLanes]) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane]->out = lanes[source(lane)]->in;
    });
    return mine.out;
}

// The lanes whose value equals one's own.
inline unsigned matching(int line, int64_t value) {
    struct Lane {
        int64_t value;
        unsigned mask;
    } mine = {value, 0};
    collective<Lane>(line, mine, [](Lane*(&lanes)[kLanes]) {
        for (auto* a : lanes)
            for (int lane = 0; lane < kLanes; ++lane) a->mask |= unsigned{lanes[lane]->value == a->value} << lane;
    });
    return mine.mask;
}

}  // namespace emulation

#define threadIdx (::emulation::ThreadIndex{})
#define blockIdx (::emulation::machine.block_index)
#define blockDim (::emulation::machine.block)
#define gridDim (::emulation::machine.grid)
#define __syncthreads() ::emulation::barrier(__LINE__)
#define __syncwarp() (void)::emulation::matching(__LINE__, 0)
#define __ballot_sync(mask, predicate) ::emulation::ballot(__LINE__, predicate)
#define __match_any_sync(mask, value) ::emulation::matching(__LINE__, value)
// The source lane of __shfl_sync must be the same in all lanes here: the last lane to arrive computes for all.
#define __shfl_sync(mask, value, from) ::emulation::shuffled(__LINE__, value, [&](int) { return (from); })
#define __shfl_up_sync(mask, value, by) ::emulation::shuffled(__LINE__, value, [&](int lane) { return lane < (by) ? lane : lane - (by); })
#define __shfl_xor_sync(mask, value, bits) ::emulation::shuffled(__LINE__, value, [&](int lane) { return lane ^ (bits); })

namespace emulation {
inline unsigned ballot(int line, bool predicate) {
    const unsigned same = matching(line, predicate);
    return predicate ? same : ~same;
}
}  // namespace emulation

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
template <typename T, typename U>
T atomicAdd(T* where, U value) {
    const T before = *where;
    *where += static_cast<T>(value);
    return before;
}

namespace dqe::cuda {

inline int64_t kept_bytes() { return emulation::machine.kept_limit; }

template <typename T>
using Shared = emulation::Pointer<T>;

inline Shared<unsigned char> shared_memory() { return {0}; }

template <typename T>
Shared<T> shared_view(Shared<unsigned char> bytes) {
    return {bytes.offset};
}

inline float4 load_float4(Shared<unsigned char> address) { return emulation::Reference<float4>{address.offset}; }
inline unsigned shared_add(Shared<unsigned> counters, int at, unsigned value) {
    const size_t offset = counters.offset + at * sizeof(unsigned);
    emulation::touch(offset, sizeof(unsigned), true, true);
    unsigned before;
    std::memcpy(&before, &emulation::machine.shared[offset], sizeof before);
    const unsigned after = before + value;
    std::memcpy(&emulation::machine.shared[offset], &after, sizeof after);
    return before;
}

inline void store_uint4(Shared<unsigned char> address, uint4 value) { emulation::Reference<uint4>{address.offset} = value; }

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t, const Args&... args) {
    return emulation::run_grid(grid, threads, shared_bytes, false, [=] { kernel(args...); });
}

template <typename... Params, typename... Args>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t, const Args&... args) {
    return emulation::run_grid(grid, threads, shared_bytes, true, [=] { kernel(args...); });
}

}  // namespace dqe::cuda
