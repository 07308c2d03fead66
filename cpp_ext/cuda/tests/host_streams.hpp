// Test only: streams on the emulation. A call that CUDA only puts on a stream is carried out at once, or, if `late` is set, when the host
// next waits for anything: all streams then run to their ends, in turns. Whatever was read too early, or written over, lent twice or given
// back too early, is found.
#pragma once

// What host_emulation.hpp carries out at once, under other names.
#define launch launch_at_once
#define launch_early launch_early_at_once
#define cudaMemsetAsync memset_at_once
#define cudaMemcpyAsync memcpy_at_once
#define cudaStreamSynchronize stream_synchronize_at_once
#define cudaMallocFromPoolAsync malloc_at_once
#define cudaFreeAsync free_at_once
#define cudaEventCreateWithFlags event_create_at_once
#define cudaEventRecord event_record_at_once
#define cudaStreamWaitEvent stream_wait_at_once
#define cudaEventDestroy event_destroy_at_once
#define cudaDeviceSynchronize device_synchronize_at_once
#include "host_emulation.hpp"
#undef launch
#undef launch_early
#undef cudaMemsetAsync
#undef cudaMemcpyAsync
#undef cudaStreamSynchronize
#undef cudaMallocFromPoolAsync
#undef cudaFreeAsync
#undef cudaEventCreateWithFlags
#undef cudaEventRecord
#undef cudaStreamWaitEvent
#undef cudaEventDestroy
#undef cudaDeviceSynchronize

#include <deque>
#include <map>

namespace emulation {

struct Stream {
    std::deque<std::function<cudaError_t()>> work;
    uint64_t queued = 0, done = 0;
};
struct Event {
    void* stream;
    uint64_t place;
};
struct Freed {
    unsigned char* data;
    size_t bytes;
};

struct Streams {
    bool late = false, captured = false;
    int64_t waits = 0;  // of the host
    std::map<void*, Stream> all;
    std::map<void*, size_t> sizes;
    std::vector<Freed> freed;  // kept, so that writes to it are found
};
inline Streams streams;
constexpr unsigned char kFreed = 0xA5;

inline cudaError_t enqueue(void* stream, std::function<cudaError_t()> work) {
    if (!streams.late) return work();
    streams.all[stream].work.push_back(std::move(work));
    ++streams.all[stream].queued;
    return cudaSuccess;
}

inline cudaError_t reach(void* stream, uint64_t place) {
    cudaError_t first = cudaSuccess;
    for (Stream& s = streams.all[stream]; s.done < place;) {
        const auto work = std::move(s.work.front());
        s.work.pop_front();
        ++s.done;
        if (const cudaError_t error = work(); first == cudaSuccess) first = error;
    }
    return first;
}

// One call of each stream in turns, until all is done; the first error of the one that is waited for, up to the place.
inline cudaError_t advance(void* awaited, uint64_t place) {
    std::vector<void*> order;
    for (const auto& [stream, state] : streams.all) order.push_back(stream);
    cudaError_t first = cudaSuccess;
    for (bool more = true; more;) {
        more = false;
        for (void* stream : order) {
            const Stream& s = streams.all[stream];
            if (s.done == s.queued) continue;
            const bool counts = stream == awaited && s.done < place;
            const cudaError_t error = reach(stream, s.done + 1);
            if (counts && first == cudaSuccess) first = error;
            more = true;
        }
    }
    return first;
}

// Bytes that were written to after they were freed; forgets what was freed.
inline int64_t written_after_free() {
    int64_t count = 0;
    for (const Freed& f : streams.freed) {
        count += std::count_if(f.data, f.data + f.bytes, [](unsigned char byte) { return byte != kFreed; });
        std::free(f.data);
    }
    streams.freed.clear();
    return count;
}

}  // namespace emulation

inline cudaError_t cudaMemsetAsync(void* where, int value, size_t bytes, cudaStream_t stream) {
    return emulation::enqueue(stream, [=] { return memset_at_once(where, value, bytes, stream); });
}
// From the host too, as from page-locked memory: nothing is staged.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return emulation::enqueue(stream, [=] { return memcpy_at_once(to, from, bytes, kind, stream); });
}
inline cudaError_t cudaMallocFromPoolAsync(void** where, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
    const cudaError_t error = malloc_at_once(where, bytes, pool, stream);
    if (error == cudaSuccess) emulation::streams.sizes[*where] = bytes;
    return error;
}
inline cudaError_t cudaFreeAsync(void* where, cudaStream_t stream) {
    return emulation::enqueue(stream, [=] {
        if (!emulation::streams.late) return free_at_once(where, stream);
        const size_t bytes = emulation::streams.sizes[where];
        std::memset(where, emulation::kFreed, bytes);
        emulation::streams.freed.push_back({static_cast<unsigned char*>(where), bytes});
        return free_at_once(nullptr, stream);
    });
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ++emulation::streams.waits;
    return emulation::advance(stream, emulation::streams.all[stream].queued);
}
inline cudaError_t cudaDeviceSynchronize() {
    emulation::advance(nullptr, 0);
    return device_synchronize_at_once();
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new emulation::Event{nullptr, 0};
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *static_cast<emulation::Event*>(event) = {stream, emulation::streams.all[stream].queued};
    return event_record_at_once(event, stream);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    const emulation::Event reached = *static_cast<emulation::Event*>(event);
    emulation::enqueue(stream, [=] { return emulation::reach(reached.stream, reached.place); });
    return stream_wait_at_once(stream, event, flags);
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ++emulation::streams.waits;
    const emulation::Event reached = *static_cast<emulation::Event*>(event);
    return emulation::advance(reached.stream, reached.place);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete static_cast<emulation::Event*>(event);
    return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = emulation::streams.captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

namespace dqe::cuda {

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Args&... args) {
    return emulation::enqueue(stream, [=] { return launch_at_once(kernel, grid, threads, shared_bytes, stream, args...); });
}

template <typename... Params, typename... Args>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                         const Args&... args) {
    return emulation::enqueue(stream, [=] { return launch_early_at_once(kernel, grid, threads, shared_bytes, stream, args...); });
}

}  // namespace dqe::cuda
