// Threads that start and end with the work. An OpenMP team would go on spinning for a while after each call and take the
// processors from whatever the caller runs next (docs/decisions.md, 13).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace dqe::cpu {

// Below this many multiply-adds a further thread costs more than it gains: some 20 microseconds where a processor is idle, and
// milliseconds where the system has given it to another thread, of ONNX Runtime's pool for one.
constexpr int64_t kWorkPerThread = 1 << 21;

inline int useful_threads(int wanted, int64_t work) {
    const int64_t most = wanted > 0 ? wanted : std::max(1u, std::thread::hardware_concurrency());
    return static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, most));
}

// Calls part(thread, i) for i from 0 to count - 1, each once and, on one thread, in ascending order. What a part throws (memory
// that is not there) ends the work of its thread and is thrown here, once all threads have ended.
template <typename Part>
void for_each_part(int64_t count, int threads, const Part& part) {
    std::atomic<int64_t> next{0};
    std::vector<std::exception_ptr> failures(static_cast<size_t>(threads));
    const auto work = [&](int thread) noexcept {
        try {
            for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count; i = next.fetch_add(1, std::memory_order_relaxed))
                part(thread, i);
        } catch (...) {
            failures[static_cast<size_t>(thread)] = std::current_exception();
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<size_t>(threads));
    try {
        for (int t = 1; t < std::min<int64_t>(threads, count); ++t) helpers.emplace_back(work, t);
    } catch (const std::exception&) {  // system_error, bad_alloc
        // The system grants no more threads; those there are do all the work.
    }
    work(0);
    for (std::thread& helper : helpers) helper.join();
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

}  // namespace dqe::cpu
