// Test only: a block's threads as fibers, their scheduler, and shared memory whose accesses are checked. host_emulation.hpp says what is
// caught.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Gate {  // opens when its generation moves on
    int arrived = 0;
    int line = 0;
    uint32_t generation = 1;
};

struct Warp {
    Gate gate;
    void* lanes[kLanes] = {};
};

struct Copy {
    size_t to;
    const unsigned char* from;
    int size, bytes;
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started = false, done = true;
    const Gate* waits = nullptr;
    uint32_t seen = 0;
    std::vector<std::vector<Copy>> groups;  // asynchronous copies by committed group; the last one is still open
};

// What is known about one 4-byte word of shared memory. Readers: a thread, or kSeveral - warp, or kMany. Writers: a thread, or
// kAtomic: atomic operations may meet each other, but nothing else.
constexpr int kNobody = -1, kMany = -2, kSeveral = -3, kAtomic = -1000000;
struct Word {
    bool written = false, in_flight = false;
    int writer = kNobody, reader = kNobody;
    uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
};

struct Machine {
    // Settings of the tests.
    int shared_limit = 227 * 1024, multiprocessors = 3;
    int64_t kept_limit = 1 << 30;
    int capability = 80;
    uint64_t order = 0;
    int stale_reads = 0;  // corruption for the tests of the tests: see host_ptx.hpp
    int wrong_lanes = 0;
    // The running block.
    std::vector<Fiber> fibers;
    std::vector<unsigned char*> stacks;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    std::vector<Word> words;
    Gate barrier;
    dim3 grid, block, block_index;
    int current = 0;
    jmp_buf scheduler;
    size_t turn = 0;  // here, not local to the scheduler: a long jump back need not preserve its registers
    bool moved = false;
    int remaining = 0;
    std::function<void()> body;
    bool (*background)(bool idle) = nullptr;  // what goes on besides the threads; false where there is nothing to do
    uint64_t rounds = 0;
    std::string error;
    int64_t launches = 0, allocations = 0, fills = 0;
    // A kernel that was launched early: what it must not touch until the kernel ahead has ended, which is when none of its threads can move
    // any more. Whole pages.
    struct Region {
        unsigned char* start;
        size_t bytes;
    };
    std::vector<Region> hidden;
    bool early = false, released = false;
    Gate ahead;
    int64_t early_launches = 0;  // of this call
    int64_t unawaited = 0;  // corruption for the tests of the tests: the early launch that does not wait; negative: its producers alone
    int producers_from = 256;
    std::string log;  // of the calls that order streams
};
inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
    if (machine.error.empty())
        machine.error = what + " (thread " + std::to_string(machine.current) + ", block " + std::to_string(machine.block_index.x) + "," +
                        std::to_string(machine.block_index.y) + ")";
    _longjmp(machine.scheduler, 2);
}

// Let the running block touch what is hidden from kernels that were launched early, or let it not.
inline void reveal(bool visible) {
    for (const Machine::Region& region : machine.hidden)
        if (mprotect(region.start, region.bytes, visible ? PROT_READ | PROT_WRITE : PROT_NONE)) std::abort();
    machine.released = visible;
}

inline struct sigaction before_hiding;

inline void on_fault(int, siginfo_t* info, void*) {
    const auto* at = static_cast<const unsigned char*>(info->si_addr);
    for (const Machine::Region& region : machine.hidden)
        if (!machine.released && at >= region.start && at < region.start + region.bytes)
            fail("touched what the kernel ahead may still write, or read");
    sigaction(SIGSEGV, &before_hiding, nullptr);  // not ours: the access is made again, without us
}

// From now on early kernels of this call are stopped where they touch these pages before they may.
struct Hiding {
    explicit Hiding(unsigned char* start, size_t bytes) {
        static unsigned char stack[64 * 1024];
        const stack_t other = {stack, 0, sizeof stack};
        sigaltstack(&other, &stack_before_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // fail() leaves the handler by a jump
        sigaction(SIGSEGV, &action, &before_hiding);
        if (bytes) machine.hidden = {{start, bytes}};
    }
    ~Hiding() {
        machine.hidden.clear();
        sigaction(SIGSEGV, &before_hiding, nullptr);
        sigaltstack(&stack_before_, nullptr);
    }
    stack_t stack_before_;
};

inline void switch_to_scheduler() {
    if (_setjmp(machine.fibers[machine.current].resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void wait_at(Gate& gate) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.waits = &gate;
    fiber.seen = gate.generation;
    switch_to_scheduler();
}

template <typename Last>
void arrive(Gate& gate, int expected, int line, const Last& last) {
    if (gate.arrived == 0) gate.line = line;
    if (gate.line != line) fail("divergence: line " + std::to_string(line) + " while others wait at line " + std::to_string(gate.line));
    if (++gate.arrived < expected) return wait_at(gate);
    last();
    gate.arrived = 0;
    ++gate.generation;
}

inline void barrier(int line) {
    arrive(machine.barrier, static_cast<int>(machine.fibers.size()), line, [] {});
}

// Every lane brings a T; the last to arrive computes for all of them.
template <typename T, typename Compute>
void collective(int line, T& mine, const Compute& compute) {
    Warp& warp = machine.warps[machine.current / kLanes];
    warp.lanes[machine.current % kLanes] = &mine;
    arrive(warp.gate, kLanes, line, [&] {
        T* lanes[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<T*>(warp.lanes[lane]);
        compute(lanes);
    });
}

inline void touch(size_t offset, size_t bytes, bool write, bool atomic = false) {
    if (offset + bytes > machine.shared.size() || offset % std::min<size_t>(bytes, 16))
        fail("shared memory: bad address " + std::to_string(offset));
    const int thread = machine.current, warp = thread / kLanes;
    const uint32_t epoch = machine.barrier.generation, warp_epoch = machine.warps[warp].gate.generation;
    const auto stop = [](const char* what, size_t at) { fail(what + (" at byte " + std::to_string(at * 4))); };
    for (size_t at = offset / 4; at < (offset + bytes + 3) / 4; ++at) {
        Word& word = machine.words[at];
        if ((!write || atomic) && !word.written) stop("shared memory read before it is written", at);
        if (word.in_flight) stop("shared memory touched while a copy to it is under way", at);
        if (word.write_epoch == epoch && word.writer != (atomic ? kAtomic : thread) &&
            !(word.writer / kLanes == warp && word.write_warp_epoch < warp_epoch))
            stop("race with another thread's write", at);
        if (write) {
            const bool same_warp = word.reader >= 0 ? word.reader / kLanes == warp : word.reader == kSeveral - warp;
            if (word.read_epoch == epoch && word.reader != thread && !(same_warp && word.read_warp_epoch < warp_epoch))
                stop("race with another thread's read", at);
            word.written = true;
            word.writer = atomic ? kAtomic : thread, word.write_epoch = epoch, word.write_warp_epoch = warp_epoch;
        } else {
            // What its own warp read before its last operation is over, for all lanes.
            const bool of_warp = word.reader >= 0 ? word.reader / kLanes == warp : word.reader == kSeveral - warp;
            if (word.read_epoch != epoch || word.reader == thread || (of_warp && word.read_warp_epoch < warp_epoch))
                word.reader = thread;
            else if (word.reader != kMany) {
                const int other = word.reader >= 0 ? word.reader / kLanes : kSeveral - word.reader;
                word.reader = other == warp ? kSeveral - warp : kMany;
            }
            word.read_epoch = epoch, word.read_warp_epoch = warp_epoch;
        }
    }
}

// A place in shared memory whose reads and writes are checked.
template <typename T>
struct Reference {
    size_t offset;
    operator T() const {
        touch(offset, sizeof(T), false);
        T value;
        std::memcpy(&value, &machine.shared[offset], sizeof(T));
        return value;
    }
    T operator=(T value) const {
        touch(offset, sizeof(T), true);
        std::memcpy(&machine.shared[offset], &value, sizeof(T));
        return value;
    }
    T operator=(const Reference& other) const { return *this = static_cast<T>(other); }
    T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
};

template <typename T>
struct Pointer {
    size_t offset = 0;
    Reference<T> operator[](int64_t i) const { return {offset + i * sizeof(T)}; }
    Pointer operator+(int64_t i) const { return {offset + i * sizeof(T)}; }
};

inline uint64_t scrambled(uint64_t x) {  // splitmix64
    x += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

inline std::vector<int> permuted(int count, uint64_t salt) {
    std::vector<int> places(count);
    for (int i = 0; i < count; ++i) places[i] = i;
    if (machine.order == 1) std::reverse(places.begin(), places.end());
    if (machine.order > 1)
        for (int i = count - 1; i > 0; --i) std::swap(places[i], places[scrambled(machine.order + salt * 977 + i) % (i + 1)]);
    return places;
}

inline void fiber_main() {
    for (;;) {
        machine.body();
        Fiber& fiber = machine.fibers[machine.current];
        for (const auto& group : fiber.groups)
            if (!group.empty()) fail("thread ended with copies under way");
        fiber.done = true;
        switch_to_scheduler();
    }
}

inline void prepare_fibers(int threads) {
    while (static_cast<int>(machine.stacks.size()) < threads) {
        void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) std::abort();
        machine.stacks.push_back(static_cast<unsigned char*>(stack));
    }
    if (static_cast<int>(machine.fibers.size()) != threads) machine.fibers = std::vector<Fiber>(threads);
    machine.warps.assign((threads + kLanes - 1) / kLanes, {});
    for (Fiber& fiber : machine.fibers) fiber.done = false, fiber.waits = nullptr, fiber.groups.assign(1, {});
}

inline void enter(int thread) {
    Fiber& fiber = machine.fibers[thread];
    machine.current = thread;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = machine.stacks[thread];
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
}

// Whether a warp gets no turn in this round, so that warps drift apart: only in kernels that something goes on besides.
inline bool dawdles(int thread) {
    return machine.background && machine.order > 1 && scrambled(machine.order + machine.rounds * 131 + thread / kLanes) % 4 == 0;
}

inline bool run_block(const std::vector<int>& places) {
    Machine& m = machine;
    for (m.remaining = static_cast<int>(places.size()); m.remaining > 0;) {
        m.moved = false;
        ++m.rounds;
        for (m.turn = 0; m.turn < places.size(); ++m.turn) {
            Fiber& fiber = m.fibers[places[m.turn]];
            if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.seen)) continue;
            if (dawdles(places[m.turn])) {
                m.moved = true;
                continue;
            }
            fiber.waits = nullptr;
            m.moved = true;
            const int came_back = _setjmp(m.scheduler);
            if (came_back == 0) enter(places[m.turn]);
            if (came_back == 2) return false;
            if (m.fibers[places[m.turn]].done) --m.remaining;
        }
        const bool more = m.background && m.background(!m.moved);
        if (!m.moved && !more && m.early && !m.released) {  // nothing is left to do before the kernel ahead has ended
            reveal(true);
            ++m.ahead.generation;
            continue;
        }
        if (!m.moved && !more) {
            m.error = "divergence: some threads wait at line " + std::to_string(m.barrier.line) + ", others never come";
            return false;
        }
    }
    if (m.background && m.background(true)) m.error = "block ended with copies under way";
    return m.error.empty();
}

inline cudaError_t run_grid(dim3 grid, unsigned threads, size_t shared_bytes, bool early, std::function<void()> body) {
    ++machine.launches;
    machine.early_launches += early;
    machine.early = early;
    if (static_cast<int>(shared_bytes) > machine.shared_limit || threads > 1024 || threads % kLanes || !grid.x || !grid.y) {
        machine.error = "launch configuration";
        return cudaErrorInvalidValue;
    }
    machine.grid = grid;
    machine.block = dim3(threads);
    machine.body = std::move(body);
    for (int index : permuted(static_cast<int>(grid.x * grid.y), 1)) {
        machine.block_index = dim3(index % grid.x, index / grid.x);
        prepare_fibers(static_cast<int>(threads));
        machine.shared.assign((shared_bytes + 15) / 16 * 16, 0xFF);  // NaN as f16, f32 and f64
        machine.words.assign(machine.shared.size() / 4, {});
        machine.barrier = {};
        machine.background = nullptr;
        machine.ahead = {};
        if (early) reveal(false);
        const bool ran = run_block(permuted(static_cast<int>(threads), 2 + index));
        if (early) reveal(true);
        if (!ran) {
            machine.fibers.clear();  // abandoned half-way: the next launch starts fresh ones
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

}  // namespace emulation
