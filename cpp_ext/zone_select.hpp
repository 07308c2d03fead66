// Streaming selection over scores that arrive item by item: top-k, zones, pick keys. No Python, no intrinsics, no
// allocation: one row of state per query in memory the caller owns, so that it compiles for host and device alike.
//
// The definition is dqe_engine/zones/reference.py. Comparisons with NaN are false throughout, and the code relies on it:
// a NaN score never ranks and a NaN score or Δ is in no zone. Items may arrive in any order.
#pragma once

#include <cstdint>

#include "philox.hpp"

namespace dqe {

// The best `capacity` entries seen: a binary heap over two or three parallel arrays whose root is the worst entry kept.
// Entries rank by key descending, then id ascending. Unused slots hold key -inf and id -1, which as an unsigned id
// ranks behind every real entry: no size has to be kept, and what is left unused is the padding that callers get.
template <typename Key>
struct BestHeap {
    Key* keys;
    int64_t* ids;
    float* payload;  // may be null
    int64_t capacity;

    DQE_HOST_DEVICE static bool ranks_before(Key key_a, int64_t id_a, Key key_b, int64_t id_b) {
        return key_a > key_b || (key_a == key_b && static_cast<uint64_t>(id_a) < static_cast<uint64_t>(id_b));
    }

    // Offer an entry; dropped if it ranks behind all that are kept.
    DQE_HOST_DEVICE void offer(Key key, int64_t id, float value) {
        if (capacity > 0 && ranks_before(key, id, keys[0], ids[0])) sift_down(capacity, key, id, value);
    }

    // Order the entries best first. It is a heap no longer: offer nothing after this.
    DQE_HOST_DEVICE void sort() {
        for (int64_t last = capacity - 1; last > 0; --last) {
            const Key key = keys[last];
            const int64_t id = ids[last];
            const float value = payload ? payload[last] : 0.0f;
            move(0, last);
            sift_down(last, key, id, value);
        }
    }

  private:
    DQE_HOST_DEVICE void move(int64_t from, int64_t to) {
        keys[to] = keys[from];
        ids[to] = ids[from];
        if (payload) payload[to] = payload[from];
    }

    // Replace the root of the heap of `size` entries and restore the heap.
    DQE_HOST_DEVICE void sift_down(int64_t size, Key key, int64_t id, float value) {
        int64_t hole = 0;
        for (int64_t child = 1; child < size; child = 2 * hole + 1) {
            if (child + 1 < size && ranks_before(keys[child], ids[child], keys[child + 1], ids[child + 1])) ++child;
            if (!ranks_before(key, id, keys[child], ids[child])) break;
            move(child, hole);
            hole = child;
        }
        keys[hole] = key;
        ids[hole] = id;
        if (payload) payload[hole] = value;
    }
};

enum class Policy : int { hardest = 0, uniform = 1, softmax = 2 };

struct PickRule {
    Policy policy;
    double temperature;
    uint64_t seed;
};

DQE_HOST_DEVICE inline double softmax_key(const PickRule& rule, float score, double u) { return score / rule.temperature + gumbel(u); }

DQE_HOST_DEVICE inline double pick_key(const PickRule& rule, float score, int64_t query, int64_t item) {
    if (rule.policy == Policy::hardest) return score;
    const double u = uniform(rule.seed, static_cast<uint64_t>(query), static_cast<uint64_t>(item));
    return rule.policy == Policy::uniform ? u : softmax_key(rule, score, u);
}

// near: Δ < lo; mid: lo <= Δ <= hi; easy: Δ > hi, with Δ = anchor - score in f32.
struct ZoneBounds {
    float anchor, lo, hi;
};

}  // namespace dqe
