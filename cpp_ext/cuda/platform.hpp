// What the kernels need from CUDA, in one place, so that the same sources also compile as plain C++ and run on a CPU (tests).
//
// Under nvcc this is CUDA itself. With DQE_HOST_EMULATION it is cpp_ext/cuda/tests/host_emulation.hpp, which runs a block's
// threads as fibers and checks every shared-memory access. Kernels therefore touch shared memory only through Shared<T>, use
// only dynamic shared memory, and start through launch().
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#ifdef DQE_HOST_EMULATION
#include "tests/host_streams.hpp"
#else
#include <cuda_runtime.h>

#define DQE_NOINLINE __noinline__

namespace dqe::cuda {

// What the kept scores of a block of queries may take (see kept.hpp).
constexpr int64_t kept_bytes() { return 1ll << 30; }

// A pointer into shared memory.
template <typename T>
using Shared = T*;

#ifdef __CUDACC__
// Begins at a multiple of 1,024: the swizzle of TMA and of wgmma goes by address bits.
__device__ inline Shared<unsigned char> shared_memory() {
    extern __shared__ __align__(1024) unsigned char dqe_shared_memory[];
    return dqe_shared_memory;
}

template <typename T>
__device__ inline Shared<T> shared_view(Shared<unsigned char> bytes) {
    return reinterpret_cast<T*>(bytes);
}

// 16 bytes at once; the address must be a multiple of 16.
__device__ inline float4 load_float4(Shared<unsigned char> address) { return *reinterpret_cast<const float4*>(address); }
__device__ inline void store_uint4(Shared<unsigned char> address, uint4 value) { *reinterpret_cast<uint4*>(address) = value; }

__device__ inline unsigned shared_add(Shared<unsigned> counters, int at, unsigned value) { return atomicAdd(counters + at, value); }

// Let a kernel have all the shared memory that a block of the current device can get. Once per kernel and device: what a launch asks
// for is another matter, and threads that launch at the same time must not lower it for each other.
inline cudaError_t raise_shared_memory(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int> > raised;
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const std::lock_guard lock(mutex);
    if (raised.count({kernel, device})) return cudaSuccess;
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess) raised.insert({kernel, device});
    return error;
}

// Returns this launch's own error; cudaGetLastError would also report (and clear) one that some earlier call left behind.
template <typename... Params, typename... Args>
cudaError_t launch_with(cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(Params...), dim3 grid, unsigned threads,
                        size_t shared_bytes, cudaStream_t stream, const Args&... args) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t raised = raise_shared_memory(reinterpret_cast<const void*>(kernel));
        if (raised != cudaSuccess) return raised;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Args&... args) {
    return launch_with(nullptr, 0, kernel, grid, threads, shared_bytes, stream, args...);
}

// Start a kernel of compute capability 9.0 before the one ahead on the stream has ended: once each of that one's blocks has called
// admit_next() or ended (CUDA's programmatic dependent launch). It must call await_previous() before it reads what kernels ahead write, and
// before it writes anything. What was complete before the first kernel of such a row started may be read at once.
template <typename... Params, typename... Args>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                         const Args&... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    return launch_with(&early, 1, kernel, grid, threads, shared_bytes, stream, args...);
}
#endif  // __CUDACC__

}  // namespace dqe::cuda
#endif  // DQE_HOST_EMULATION
