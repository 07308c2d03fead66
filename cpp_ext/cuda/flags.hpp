// Words in which the device answers the host.
#pragma once

#include <mutex>
#include <vector>

#include "platform.hpp"

namespace dqe::cuda {

// What the device tells the host of.
enum Raised { kTopOverflowed, kPicksOverflowed, kAnchorOutside, kScreenFailed, kRanksMissed, kRescored, kFlags };

// Words that the device writes and the host reads once it has waited: pinned memory, which is mapped. Lent to one call at a time and
// never given back to the system, since a process may end after its driver did.
class Flags {
  public:
    Flags() {
        const std::lock_guard lock(mutex());
        if (!spare().empty()) {
            words_ = spare().back();
            spare().pop_back();
        } else {
            void* made = nullptr;
            error_ = cudaHostAlloc(&made, kFlags * sizeof(unsigned), cudaHostAllocPortable);
            words_ = static_cast<volatile unsigned*>(made);
        }
    }
    ~Flags() {
        const std::lock_guard lock(mutex());
        if (words_) spare().push_back(words_);
    }
    Flags(const Flags&) = delete;
    cudaError_t error() const { return error_; }
    volatile unsigned* word(Raised flag) const { return words_ + flag; }
    bool raised(Raised flag) const { return words_[flag] != 0; }
    void lower_all() const {
        for (int flag = 0; flag < kFlags; ++flag) words_[flag] = 0;
    }

  private:
    static std::mutex& mutex() {
        static std::mutex made;
        return made;
    }
    static std::vector<volatile unsigned*>& spare() {
        static auto* made = new std::vector<volatile unsigned*>;
        return *made;
    }
    volatile unsigned* words_ = nullptr;
    cudaError_t error_ = cudaSuccess;
};

}  // namespace dqe::cuda
