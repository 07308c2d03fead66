// Memory of a CUDA device as Python's objects hold it, and CUDA's errors as exceptions.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>

#include "platform.hpp"

namespace dqe::cuda {

inline void check(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // what is not sticky is dealt with: leave nothing behind for the next caller's check
    throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// Makes a device current, and on leaving the one that was.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(before_); }
    DeviceGuard(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
};

// A pool of our own per device. The device's default pool gives everything back at each synchronisation, and then every call pays
// for new memory; changing its threshold would change it for all who share the process. `own`: a stream that outlives those of callers.
struct Pool {
    cudaMemPool_t memory = nullptr;
    cudaStream_t own = nullptr;
};

inline Pool pool_of(int device) {
    constexpr uint64_t kKept = 256ull << 20;
    static std::mutex mutex;
    static auto* pools = new std::map<int, Pool>;  // never destroyed: results may outlive everything else
    const std::lock_guard lock(mutex);
    Pool& pool = (*pools)[device];
    if (pool.memory) return pool;
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    Pool made;
    check(cudaMemPoolCreate(&made.memory, &properties), "cudaMemPoolCreate");
    uint64_t kept = kKept;
    check(cudaMemPoolSetAttribute(made.memory, cudaMemPoolAttrReleaseThreshold, &kept), "cudaMemPoolSetAttribute");
    check(cudaStreamCreateWithFlags(&made.own, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return pool = made;
}

// Device memory for the time of a call, in the order of its stream.
class Scratch {
  public:
    Scratch(size_t bytes, int device, cudaStream_t stream) : stream_(stream) {
        check(cudaMallocFromPoolAsync(&data_, bytes ? bytes : 1, pool_of(device).memory, stream), "cudaMallocFromPoolAsync");
    }
    ~Scratch() { cudaFreeAsync(data_, stream_); }
    Scratch(const Scratch&) = delete;
    unsigned char* data() const { return static_cast<unsigned char*>(data_); }

  private:
    void* data_ = nullptr;
    cudaStream_t stream_;
};

// Device memory of results, which is complete when the call returns. Its consumers name the streams that they work on, and may let go
// of it while work on them is under way: it is freed behind that work, whatever became of the stream of the call.
class Memory {
  public:
    Memory(size_t bytes, int device, cudaStream_t stream) : device_(device), freeing_(pool_of(device).own) {
        check(cudaMallocFromPoolAsync(&data_, bytes ? bytes : 1, pool_of(device).memory, stream), "cudaMallocFromPoolAsync");
    }
    ~Memory() {
        int before = 0;
        if (cudaGetDevice(&before) != cudaSuccess) return;  // the process is ending
        cudaSetDevice(device_);
        if (unnamed_) cudaDeviceSynchronize();
        // With one stream to be behind, that stream itself frees it: one call in place of five, and its next search has it at once.
        if (unnamed_ || streams_.size() != 1 || cudaFreeAsync(data_, *streams_.begin()) != cudaSuccess) free_behind_all();
        cudaGetLastError();  // leave nothing behind for the next caller's check
        cudaSetDevice(before);
    }
    Memory(const Memory&) = delete;
    unsigned char* data() const { return static_cast<unsigned char*>(data_); }

    // `stream` as DLPack has it: None is the default stream, -1 one that the consumer keeps to itself.
    void lend(std::optional<int64_t> stream) {
        constexpr int64_t kLegacyDefault = 1, kUnnamed = -1;
        const int64_t handle = stream.value_or(kLegacyDefault);
        if (handle == kUnnamed)
            unnamed_ = true;
        else
            streams_.insert(reinterpret_cast<cudaStream_t>(handle));  // 1 and 2 are the runtime's own names of its default streams
    }

  private:
    void free_behind_all() {
        for (const cudaStream_t stream : streams_) {
            cudaEvent_t reached = nullptr;
            if (cudaEventCreateWithFlags(&reached, cudaEventDisableTiming) != cudaSuccess) continue;
            if (cudaEventRecord(reached, stream) == cudaSuccess) cudaStreamWaitEvent(freeing_, reached, 0);
            cudaEventDestroy(reached);
        }
        cudaFreeAsync(data_, freeing_);
    }

    void* data_ = nullptr;
    int device_;
    cudaStream_t freeing_;
    std::set<cudaStream_t> streams_;  // guarded by the interpreter's lock
    bool unnamed_ = false;
};

// A workspace that calls over the same items share: as large as the largest needed. One call at a time has it; others take memory of
// their own meanwhile. Work of a call that does not wait goes on in it, and what comes next is put behind that.
class Room {
  public:
    std::mutex mutex;
    size_t bytes = 0;

    Room() = default;
    Room(const Room&) = delete;
    ~Room() {
        if (!used_) return;
        free_behind_use();
        memory_.reset();
        cudaEventDestroy(used_);
    }

    unsigned char* of(size_t needed, int device, cudaStream_t stream) {
        if (used_) check(cudaStreamWaitEvent(stream, used_, 0), "cudaStreamWaitEvent");
        if (needed > bytes) {
            if (used_) free_behind_use();
            bytes = 0, memory_.reset();  // before there is more
            own_ = pool_of(device).own;
            memory_ = std::make_unique<Memory>(needed, device, stream);
            bytes = needed;
        }
        return memory_->data();
    }

    // What was started on the stream still uses it.
    void leave(cudaStream_t stream) {
        if (!used_) check(cudaEventCreateWithFlags(&used_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
        check(cudaEventRecord(used_, stream), "cudaEventRecord");
    }

  private:
    void free_behind_use() { cudaStreamWaitEvent(own_, used_, 0); }

    std::unique_ptr<Memory> memory_;
    cudaStream_t own_ = nullptr;
    cudaEvent_t used_ = nullptr;
};

}  // namespace dqe::cuda
