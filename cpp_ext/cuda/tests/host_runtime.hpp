// Test only: the part of CUDA's runtime that the host code calls, on the host's own memory.
#pragma once

#include "host_block.hpp"

inline cudaError_t cudaMemsetAsync(void* where, int value, size_t bytes, cudaStream_t) {
    std::memset(where, value, bytes);
    ++emulation::machine.fills;
    return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    if (bytes) std::memcpy(to, from, bytes);
    return cudaSuccess;
}
constexpr unsigned cudaHostAllocPortable = 1;
inline cudaError_t cudaHostAlloc(void** where, size_t bytes, unsigned) {
    *where = std::calloc(1, bytes);
    return *where ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const emulation::Machine& m = emulation::machine;
    *value = attribute == cudaDevAttrMultiProcessorCount      ? m.multiprocessors
             : attribute == cudaDevAttrComputeCapabilityMajor ? m.capability / 10
             : attribute == cudaDevAttrComputeCapabilityMinor ? m.capability % 10
                                                              : m.shared_limit;
    return cudaSuccess;
}
// One device, whose memory is the host's. What the adapter allocates is counted, so that tests see that it is freed.
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "error"; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::machine.error.c_str(); }
using cudaMemPool_t = void*;
enum { cudaMemAllocationTypePinned, cudaMemLocationTypeDevice, cudaMemPoolAttrReleaseThreshold };
struct cudaMemPoolProps {
    int allocType;
    struct {
        int type, id;
    } location;
};
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
    *pool = &emulation::machine;
    return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void*) { return cudaSuccess; }
inline cudaError_t cudaMallocFromPoolAsync(void** where, size_t bytes, cudaMemPool_t, cudaStream_t) {
    *where = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!*where) return cudaErrorMemoryAllocation;
    std::memset(*where, 0xFF, bytes);
    ++emulation::machine.allocations;
    return cudaSuccess;
}
namespace emulation {
inline void note(const char* what, const void* stream) {
    machine.log += what + (" " + std::to_string(reinterpret_cast<uintptr_t>(stream)) + ";");
}
}  // namespace emulation
inline cudaError_t cudaFreeAsync(void* where, cudaStream_t stream) {
    std::free(where);
    --emulation::machine.allocations;
    emulation::note("free", stream);
    return cudaSuccess;
}
using cudaEvent_t = void*;
constexpr unsigned cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = reinterpret_cast<cudaStream_t>(1000);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) {
    emulation::note("record", stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
    emulation::note("wait", stream);
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() {
    emulation::note("synchronize", nullptr);
    return cudaSuccess;
}
