// The best entries seen, unordered, in a buffer with room for some more: constant work per entry on average, where a heap's
// grows with its size. An entry is one integer: the score's order-preserving image above the complement of the id, so that
// entries compare by score descending, then id ascending.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace dqe::cpu {

// Monotone from the floats (no NaN; -0 counts as 0) to unsigned integers.
inline uint32_t order_image(float score) {
    const auto bits = std::bit_cast<uint32_t>(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float score_of_image(uint32_t image) { return std::bit_cast<float>(image & 0x80000000u ? image & 0x7FFFFFFFu : ~image); }

inline uint64_t entry_of(float score, int64_t id) { return uint64_t{order_image(score)} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(id)); }
inline float entry_score(uint64_t entry) { return score_of_image(static_cast<uint32_t>(entry >> 32)); }
inline int64_t entry_id(uint64_t entry) { return 0xFFFFFFFFu - static_cast<uint32_t>(entry); }

class Reservoir {
  public:
    // Entries that the buffer of a reservoir for the `capacity` best must have room for.
    static int64_t room(int64_t capacity) { return capacity == 0 ? 0 : capacity + std::max<int64_t>(16, capacity / 2); }

    Reservoir() = default;
    // `eager`: the threshold rises with nearly every entry, where each one that is kept out saves more than that costs.
    Reservoir(uint64_t* buffer, int64_t capacity, bool eager = false) : entries_(buffer), capacity_(capacity), eager_(eager) {}

    // The score must not be NaN. Returns whether the threshold has risen, as it does now and then.
    bool offer(float score, int64_t id) {
        if (score < threshold_) return false;
        entries_[size_++] = entry_of(score, id);
        if (size_ < (eager_ ? capacity_ + 1 + capacity_ / 16 : room(capacity_))) return false;
        prune();
        return true;
    }

    // What is below it cannot be among the best.
    float threshold() const { return threshold_; }
    // Whether anything was left out; it was not above the threshold.
    bool dropped() const { return dropped_; }
    int64_t size() const { return size_; }

    // The score at a rank below size(), best first.
    float at_rank(int64_t rank) {
        std::nth_element(entries_, entries_ + rank, entries_ + size_, std::greater<uint64_t>());
        return entry_score(entries_[rank]);
    }

    template <typename Visit>
    void for_each(const Visit& visit) const {
        for (int64_t i = 0; i < size_; ++i) visit(entry_score(entries_[i]), entry_id(entries_[i]));
    }

    // Forget what was kept, for it was not the entries themselves.
    void clear() { size_ = 0, threshold_ = kNothing, dropped_ = false; }

    // From here on keep the `capacity` best that are not below `threshold`.
    void restart(int64_t capacity, float threshold) {
        capacity_ = capacity;
        if (capacity_ > 0 && size_ >= room(capacity_)) prune();
        threshold_ = std::max(threshold_, threshold);
        dropped_ = dropped_ || threshold > kNothing;
    }

    // Merging what several threads kept: collect all entries in one vector, join the limits, then work on that vector.
    void drain_to(std::vector<uint64_t>& all) const { all.insert(all.end(), entries_, entries_ + size_); }

    void join_limits(const Reservoir& other) {
        threshold_ = std::max(threshold_, other.threshold_);
        dropped_ = dropped_ || other.dropped_;
    }

    void adopt(std::vector<uint64_t>& all) {
        entries_ = all.data();
        size_ = static_cast<int64_t>(all.size());
    }

  private:
    static constexpr float kNothing = -std::numeric_limits<float>::infinity();

    void prune() {
        std::nth_element(entries_, entries_ + capacity_ - 1, entries_ + size_, std::greater<uint64_t>());
        size_ = capacity_;
        threshold_ = entry_score(entries_[capacity_ - 1]);
        dropped_ = true;
    }

    uint64_t* entries_ = nullptr;
    int64_t capacity_ = 0, size_ = 0;
    float threshold_ = kNothing;
    bool dropped_ = false, eager_ = false;
};

}  // namespace dqe::cpu
