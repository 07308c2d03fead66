// Which items of a gallery queries may return, as bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace dqe::cpu {

// Bit i % 64 of word i / 64 of a row stands for item i; bits behind the last item are ignored. `stride`: words from one query's row to
// the next, 0 where all share one. Null: every query may return every item.
struct Bitmap {
    const uint64_t* words;
    int64_t stride;
};

// A bitmap of `size` items for `batch` queries, and what it says of all of them together.
class Allowed {
  public:
    Allowed(const Bitmap& bitmap, int64_t batch, int64_t size) : bitmap_(bitmap), size_(size), some_(bitmap.words) {
        if (!bitmap.words || batch == 0) return;
        const int64_t words = (size + 63) / 64;
        const int64_t rows = bitmap.stride ? batch : 1;
        if (rows > 1) {
            united_.assign(bitmap.words, bitmap.words + words);
            for (int64_t b = 1; b < rows; ++b)
                for (int64_t w = 0; w < words; ++w) united_[static_cast<size_t>(w)] |= bitmap.words[b * bitmap.stride + w];
            some_ = united_.data();
        }
        for (int64_t b = 0; b < rows; ++b) counts_.push_back(count_bits(bitmap.words + b * bitmap.stride, 0, size));
    }
    Allowed(const Allowed&) = delete;
    Allowed& operator=(const Allowed&) = delete;

    bool everything() const { return !bitmap_.words; }
    bool shared() const { return bitmap_.stride == 0; }

    bool allows(int64_t b, int64_t id) const { return !bitmap_.words || (bitmap_.words[b * bitmap_.stride + id / 64] >> (id % 64) & 1); }

    // Items that query b may return, of all and of `count` from `first` on; and those that any query may.
    int64_t count(int64_t b) const { return counts_.empty() ? size_ : counts_[shared() ? 0 : static_cast<size_t>(b)]; }
    int64_t count(int64_t b, int64_t first, int64_t count) const {
        return bitmap_.words ? count_bits(bitmap_.words + b * bitmap_.stride, first, first + count) : count;
    }
    int64_t count_of_some() const { return count_of_some(0, size_); }
    int64_t count_of_some(int64_t first, int64_t count) const { return some_ ? count_bits(some_, first, first + count) : count; }
    // The most that one query may return.
    int64_t most() const { return counts_.empty() ? size_ : *std::max_element(counts_.begin(), counts_.end()); }

    // How far behind `first` the items are that any query may return, ascending, among `count`; there is a bitmap.
    int64_t list_some(int64_t first, int64_t count, uint32_t* offsets) const {
        int64_t found = 0;
        for_each_word(first, first + count, [&](int64_t word, uint64_t mask) {
            for (uint64_t bits = some_[word] & mask; bits; bits &= bits - 1)
                offsets[found++] = static_cast<uint32_t>(word * 64 + std::countr_zero(bits) - first);
        });
        return found;
    }

    // Calls visit(offset) for the others.
    template <typename Visit>
    void for_each_other(int64_t first, int64_t count, const Visit& visit) const {
        for_each_word(first, first + count, [&](int64_t word, uint64_t mask) {
            for (uint64_t bits = ~some_[word] & mask; bits; bits &= bits - 1) visit(word * 64 + std::countr_zero(bits) - first);
        });
    }

  private:
    // Calls visit(word, mask) for the words that hold the bits from `from` to `to`.
    template <typename Visit>
    static void for_each_word(int64_t from, int64_t to, const Visit& visit) {
        for (int64_t word = from / 64; word * 64 < to; ++word) {
            uint64_t mask = ~uint64_t{0};
            if (word * 64 < from) mask &= ~uint64_t{0} << (from - word * 64);
            if (to - word * 64 < 64) mask &= (uint64_t{1} << (to - word * 64)) - 1;
            visit(word, mask);
        }
    }

    static int64_t count_bits(const uint64_t* words, int64_t from, int64_t to) {
        int64_t count = 0;
        for_each_word(from, to, [&](int64_t word, uint64_t mask) { count += std::popcount(words[word] & mask); });
        return count;
    }

    Bitmap bitmap_;
    int64_t size_;
    const uint64_t* some_;          // what any query may return
    std::vector<uint64_t> united_;  // the same, where it had to be made
    std::vector<int64_t> counts_;   // by row
};

}  // namespace dqe::cpu
