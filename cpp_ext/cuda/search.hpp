// A search that nobody has waited for yet.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

#include "device_memory.hpp"
#include "zones.hpp"

namespace dqe::cuda {

using HostIds = nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::device::cpu, nanobind::c_contig>;

inline void throw_fault(Fault fault) {
    if (fault == Fault::anchor_outside) throw std::invalid_argument("anchor: an id is not a position in items");
    if (fault == Fault::workspace_too_small) throw std::invalid_argument("workspace: too small, or not aligned to 256 bytes");
    if (fault == Fault::shared_memory_too_small)
        throw std::runtime_error("this device has too little shared memory per block for these kernels");
}

// What was started, and all that must stay until it has ended. Queries, anchors and exclusions are copied, so that a search can be repeated
// whatever the caller did to them. An unlucky order of the items is found when somebody settles it, and the search repeated then, in memory
// and on a stream of the module's own: the caller's may be gone. Nobody need settle it: it waits before it lets go.
class Search {
  public:
    Search(int device, cudaStream_t stream, size_t input_bytes) : inputs(input_bytes, device, stream), device_(device), stream_(stream) {
        check(flags.error(), "cudaHostAlloc");
        check(cudaEventCreateWithFlags(&reached_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    }
    ~Search() {
        if (begun_ && !settled_) cudaEventSynchronize(reached_);
        if (!begun_) cudaStreamSynchronize(stream_);  // copies may be under way
        cudaEventDestroy(reached_);
        cudaGetLastError();  // leave nothing behind for the next caller's check
    }
    Search(const Search&) = delete;

    // Without the interpreter's lock.
    void begin(void* workspace, size_t bytes) {
        status_ = start(request, result, workspace, bytes, stream_, flags);
        if (status_.error != cudaSuccess || status_.fault != Fault::none) return;
        status_.error = cudaEventRecord(reached_, stream_);
        begun_ = status_.error == cudaSuccess;
    }

    // With it, once begun and at the first sight of the results. Throws what went wrong, each time.
    void settle() {
        {
            const nanobind::gil_scoped_release release;
            const std::lock_guard lock(mutex_);
            if (begun_ && !settled_) {
                const DeviceGuard guard(device_);
                status_.error = cudaEventSynchronize(reached_);
                if (status_.error == cudaSuccess) {
                    const std::optional<Status> end = ended(status_, flags);
                    status_ = end ? *end : again();
                    repeated_ = !end;
                }
                settled_ = true;
            }
        }
        held.clear(), host.clear();
        check_status();
    }

    // Throws where nothing could be begun.
    void check_status() const {
        check(status_.error, "zone selection");
        throw_fault(status_.fault);
    }

    int64_t rescored() const { return status_.rescored; }
    bool repeated() const { return repeated_; }

    Request request = {};
    Result result = {};
    Flags flags;
    Memory inputs;
    std::vector<nanobind::object> held;  // what the kernels read and write
    std::vector<HostIds> host;           // what is copied from

  private:
    Status again() const {
        const cudaStream_t stream = pool_of(device_).own;
        const size_t bytes = workspace_bytes(request);
        const Scratch space(bytes, device_, stream);
        return select(request, result, space.data(), bytes, stream);
    }

    int device_;
    cudaStream_t stream_;  // the caller's, which may be gone once a search has begun
    std::mutex mutex_;
    cudaEvent_t reached_ = nullptr;
    Status status_ = {};
    bool begun_ = false, settled_ = false, repeated_ = false;
};

}  // namespace dqe::cuda
