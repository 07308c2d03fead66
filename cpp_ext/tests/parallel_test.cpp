// The pool under many callers at once, failures and forks; built with a sanitizer by tests/zones/test_sanitizers.py.
#include "../parallel.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <stdexcept>
#include <string_view>
#include <thread>

using namespace dqe::cpu;

namespace {

bool each_part_once(int seed) {
    const int64_t count = seed % 37;
    const int threads = 1 + seed % 5;
    std::vector<int> done(static_cast<size_t>(count)), last(static_cast<size_t>(threads), -1);
    bool ascending = true;
    for_each_part(count, threads, [&](int thread, int64_t i) {
        ++done[static_cast<size_t>(i)];
        int& before = last[static_cast<size_t>(thread)];
        if (before >= i) ascending = false;
        before = static_cast<int>(i);
    });
    for (const int times : done)
        if (times != 1) return false;
    return ascending;
}

bool failure_is_thrown(int seed) {
    try {
        for_each_part(20, 3, [&](int, int64_t i) {
            if (i == seed % 20) throw std::runtime_error("part");
        });
    } catch (const std::runtime_error&) {
        return true;
    }
    return false;
}

bool many_callers(int callers, int rounds) {
    std::atomic<bool> good{true};
    std::vector<std::thread> threads;
    for (int c = 0; c < callers; ++c)
        threads.emplace_back([&good, c, rounds] {
            for (int r = 0; r < rounds; ++r)
                if (!each_part_once(31 * c + r) || !failure_is_thrown(c + r)) good = false;
        });
    for (std::thread& thread : threads) thread.join();
    return good;
}

// A child, forked while other threads of the parent are at work, works in parallel too, and ends. `held`: all of them are inside a part
// then, not anywhere; AddressSanitizer's allocator, before GCC 14, is locked for ever in a child where a thread was inside it.
bool children(int count, bool held) {
    std::atomic<bool> stop{false}, forking{held};
    std::atomic<int> inside{0};
    std::thread busy([&] {
        for (int r = 0; !stop; ++r)
            if (forking)
                for_each_part(3, 3, [&](int, int64_t) {
                    ++inside;
                    while (forking) std::this_thread::yield();
                    --inside;
                });
            else
                each_part_once(r);
    });
    bool good = true;
    for (int i = 0; good && i < count; ++i) {
        while (inside != 0) std::this_thread::yield();  // who was held for the child before
        forking = held;
        while (held && inside != 3) std::this_thread::yield();
        const pid_t child = fork();
        if (child == 0) {
            alarm(240);  // sanitized, beside other work
            bool fine = true;
            for (int r = 0; r < 50; ++r) fine = fine && each_part_once(r);
            _exit(fine ? 0 : 1);
        }
        forking = false;
        int status = 1;
        waitpid(child, &status, 0);
        good = status == 0;
    }
    stop = true;
    forking = false;
    busy.join();
    return good;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string_view task = argc > 1 ? argv[1] : "callers";
    if (!many_callers(8, 400)) return std::puts("parts were lost, done twice or out of order"), 1;
    if (task != "callers" && !children(20, task == "held")) return std::puts("a child failed or hung"), 1;
    return std::puts("good"), 0;
}
