// Test only: launch() of platform.hpp itself, from many threads, on the runtime in fake_runtime/.
#define __CUDACC__
#include "../platform.hpp"

#include <vector>

namespace {
void large(int) {}
void small(int) {}
}  // namespace

// Launches that were refused, of threads that ask for different amounts on two devices; `sets`: how often a limit was changed.
extern "C" int refused_launches(int threads, int launches, int* sets) {
    std::atomic<int> refused{0};
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
        running.emplace_back([&, thread] {
            fake::device = thread / 2 % 2;
            for (int i = 0; i < launches; ++i) {
                const size_t bytes = (thread % 2 ? 200 : 60) * 1024;
                const auto kernel = i % 2 ? large : small;
                if (dqe::cuda::launch(kernel, dim3(1), 32, bytes, nullptr, 1) != cudaSuccess) ++refused;
            }
        });
    for (std::thread& thread : running) thread.join();
    *sets = fake::sets;
    return refused;
}
