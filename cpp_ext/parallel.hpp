// Threads that outlive the work and sleep between. An OpenMP team would go on spinning for a while after each call and take the
// processors from whatever the caller runs next (docs/decisions.md, 13).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

namespace dqe::cpu {

// Below this many multiply-adds a further thread costs more than it gains: some 20 microseconds where a processor is idle, and
// milliseconds where the system has given it to another thread, of ONNX Runtime's pool for one. Tests of what threads share set it low.
#ifndef DQE_WORK_PER_THREAD
#define DQE_WORK_PER_THREAD (1 << 21)
#endif
constexpr int64_t kWorkPerThread = DQE_WORK_PER_THREAD;

// most: at least 1.
inline int useful_threads(int most, int64_t work) { return static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, most)); }

// Calls work(context, 0) here and, meanwhile, work(context, t) for t from 1 to `helpers` on as many threads of the process's pool as
// come to it in time: perhaps on none, so that work(context, 0) must be able to do everything. Returns when all that began have ended.
// Callers may be many at a time: each then has its share of the threads. A child of fork makes a pool of its own. `work` must not throw.
void with_helpers(int helpers, void (*work)(void* context, int thread), void* context);

// Calls part(thread, i) for i from 0 to count - 1, each once and, on one thread, in ascending order. What a part throws (memory
// that is not there) ends the work of its thread and is thrown here, once all threads have ended.
template <typename Part>
void for_each_part(int64_t count, int threads, const Part& part) {
    struct Work {
        int64_t count;
        const Part& part;
        std::vector<std::exception_ptr> failures;
        std::atomic<int64_t> next{0};
    } work{count, part, std::vector<std::exception_ptr>(static_cast<size_t>(threads))};
    const auto run = [](void* context, int thread) noexcept {
        Work& work = *static_cast<Work*>(context);
        try {
            for (int64_t i = work.next.fetch_add(1, std::memory_order_relaxed); i < work.count;
                 i = work.next.fetch_add(1, std::memory_order_relaxed))
                work.part(thread, i);
        } catch (...) {
            work.failures[static_cast<size_t>(thread)] = std::current_exception();
        }
    };
    with_helpers(static_cast<int>(std::min<int64_t>(threads, count)) - 1, run, &work);
    for (const std::exception_ptr& failure : work.failures)
        if (failure) std::rethrow_exception(failure);
}

}  // namespace dqe::cpu
