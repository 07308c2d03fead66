// What a selection needs from the host before a kernel starts: sizes, and the pieces of its workspace.
#pragma once

#include <algorithm>

#include "brackets.hpp"
#include "codes.hpp"
#include "hopper.hpp"
#include "query_kernels.hpp"
#include "zones.hpp"

namespace dqe::cuda {

constexpr int64_t kLongestBlock = 1024;           // queries; more are processed block by block
constexpr int64_t kCandidateBytes = 256ll << 20;  // what the candidate lists of a block should not exceed
constexpr int64_t kSmallestList = 4096;           // entries
constexpr int64_t kLargestQueryTile = 256;
constexpr int64_t kEntryBytes = sizeof(double) + sizeof(int64_t) + sizeof(float);
constexpr int64_t kPairs = 2;  // of the screen, for each entry of a candidate list; as many columns as entries
constexpr int64_t kPairBytes = sizeof(int64_t) + sizeof(unsigned) + 2 * sizeof(int) + sizeof(float);
constexpr int64_t kColumnBytes = sizeof(int64_t) + sizeof(int) + sizeof(float);

inline int64_t power_of_two_from(int64_t size) {
    int64_t power = 1;
    while (power < size) power *= 2;
    return power;
}

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything about a request that follows from sizes and options.
struct Plan {
    Product product;
    int chunks;
    int64_t block;  // queries per block
    bool own_best, list_top, list_picks;
    bool keeps;    // the scores, as they are needed again: see kept.hpp
    bool sieves;   // zones from registers
    bool copies;   // anchors' items, for the kernels for sm_90a to score: see Passes::score_anchors
    bool screens;  // items by their codes: see screen_sieve.hpp
    int code_chunks;
    int64_t wanted, capacity;

    explicit Plan(const Request& r) {
        product = !r.half_items ? Product::single : r.half_queries ? Product::half : Product::split_half;
        chunks = static_cast<int>(quotient_up(r.width * (r.half_items ? 2 : 4), kChunkBytes));
        own_best = r.zones && r.anchor == Anchor::best;
        list_top = r.k > 0 || own_best;
        list_picks = r.zones && r.picks > 0;
        wanted = std::min(std::max({r.k, r.zones ? r.picks : 0, int64_t{1}}), r.size);
        capacity = power_of_two_from(std::min(std::max(kSmallestList, 8 * wanted), std::max(r.size, int64_t{1})));
        screens = r.screened && !r.zones && r.k > 0 && r.tokens <= 32 && 32 % r.tokens == 0 && r.width <= kMostCodedWidth;
        code_chunks = static_cast<int>(quotient_up(CodedItems::pitch(r.width), kChunkBytes));
        const int64_t screen_row = screens ? capacity * (kPairs * kPairBytes + kColumnBytes) : 0;
        const int64_t row_bytes = std::max(int64_t{1}, (list_top + list_picks) * capacity * kEntryBytes + screen_row);
        const int64_t block_bytes = screens ? 2 * kCandidateBytes : kCandidateBytes;
        block = std::clamp(block_bytes / row_bytes / 64 * 64, int64_t{64}, kLongestBlock);
        block = std::min(block, quotient_up(std::max(r.batch, int64_t{1}), 64) * 64);
        const int64_t rows = r.size ? kept_bytes() / (Kept::pitch_of(r.size) * int64_t{sizeof(float)}) : 0;
        const int unit = r.width % 8 ? 2 : 16;  // if the items' base suits
        const bool hopper = kHopperBuilt && r.zones && r.half_items && hopper_reads(r.size, r.tokens, parts(), chunks, unit) && on_hopper();
        // A Hopper reads the items once for up to 256 queries, but writes and reads 4 bytes for each score that it keeps.
        const bool reads_again = hopper && !r.ranks && !r.excludes && 8 * r.batch > r.tokens * r.width * 2;
        keeps = r.zones && (own_best || r.ranks || r.excludes) && !reads_again && rows > 0 && rows >= std::min(r.batch, int64_t{64});
        if (keeps && rows < r.batch) block = std::min(block, rows / 64 * 64);
        sieves = r.zones && !keeps && !r.ranks && !r.excludes;
        copies = hopper && sieves && !own_best;
    }

    int parts() const { return product == Product::split_half ? 2 : 1; }
};

// Hands out pieces of the workspace; with a null base it only adds up.
struct Carver {
    unsigned char* base;
    size_t used = 0;

    template <typename T>
    T* take(int64_t count) {
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
        return piece;
    }
};

struct Workspace {
    unsigned char* queries;
    float *unscale, *best;
    int64_t* gather;
    Candidates top, picks;
    RankState ranks;
    Brackets brackets;  // of the ranks, if scores are kept
    Kept kept;
    unsigned char* anchor_items;
    Kept anchor_scores;  // of these, by all queries of a block
    CodedQueries coded;
    Pairs pairs;  // the capacities of both are those of all query tiles together
    Columns columns;
    size_t bytes;

    Workspace(const Request& r, const Plan& plan, void* base) : ranks(), brackets(), kept(), anchor_scores(), coded(), pairs(), columns() {
        Carver carver = {static_cast<unsigned char*>(base)};
        const int64_t block = plan.block, listed = std::min(block, r.batch);
        const int64_t prepared = quotient_up(block, kLargestQueryTile) * kLargestQueryTile;
        queries = carver.take<unsigned char>(prepared * plan.chunks * plan.parts() * kChunkBytes);
        unscale = carver.take<float>(block);
        best = carver.take<float>(block);
        gather = carver.take<int64_t>(block);
        const auto list = [&](bool used, int64_t wanted) {
            const int64_t rows = used ? listed : 0;
            Candidates c = {};
            c.keys = carver.take<double>(rows * plan.capacity);
            c.ids = carver.take<int64_t>(rows * plan.capacity);
            c.scores = carver.take<float>(rows * plan.capacity);
            c.counts = carver.take<unsigned long long>(rows);
            c.limit_keys = carver.take<double>(rows);
            c.limit_ids = carver.take<int64_t>(rows);
            c.pending = carver.take<unsigned>(rows);
            c.wanted = std::min(wanted, r.size);
            c.capacity = plan.capacity;
            return c;
        };
        top = list(plan.list_top, std::max(r.k, int64_t{1}));
        picks = list(plan.list_picks, r.picks);
        if (r.zones && r.ranks) {
            ranks.bins = carver.take<unsigned long long>(listed * 2 * kBins);
            ranks.prefixes = carver.take<uint32_t>(listed * 2);
            ranks.left = carver.take<int64_t>(listed * 2);
            ranks.scores = carver.take<float>(listed * 2);
            ranks.lo = r.lo, ranks.hi = r.hi;
            const int64_t bracketed = plan.keeps ? listed : 0;
            brackets.capacity = Brackets::capacity_of(r.size);
            brackets.ends = carver.take<uint32_t>(bracketed * 4);
            brackets.counts = carver.take<unsigned long long>(bracketed * 8);
            brackets.totals = carver.take<unsigned long long>(bracketed);
            brackets.images = carver.take<uint32_t>(bracketed * 2 * brackets.capacity);
        }
        kept.pitch = Kept::pitch_of(r.size);
        kept.scores = carver.take<float>(plan.keeps ? listed * kept.pitch : 0);
        const int64_t copied = plan.copies ? listed : 0;
        anchor_items = carver.take<unsigned char>(copied * r.tokens * r.width * 2);
        anchor_scores.pitch = Kept::pitch_of(copied);
        anchor_scores.scores = carver.take<float>(copied * anchor_scores.pitch);
        if (plan.screens) {
            coded.codes = carver.take<unsigned char>(block * plan.code_chunks * kChunkBytes);
            coded.scales = carver.take<float>(block);
            coded.norms = carver.take<float>(block);
            coded.errors = carver.take<float>(block);
            pairs.capacity = listed * plan.capacity * kPairs;
            pairs.items = carver.take<int64_t>(pairs.capacity);
            pairs.tokens = carver.take<unsigned>(pairs.capacity);
            pairs.rows = carver.take<int>(pairs.capacity);
            pairs.bounds = carver.take<float>(pairs.capacity);
            pairs.places = carver.take<int>(pairs.capacity);
            columns.capacity = listed * plan.capacity;
            columns.tokens = carver.take<int64_t>(columns.capacity);
            columns.rows = carver.take<int>(columns.capacity);
            columns.scores = carver.take<float>(columns.capacity);
            pairs.counts = carver.take<unsigned long long>(quotient_up(block, 16));
            columns.counts = carver.take<unsigned long long>(quotient_up(block, 16));
        }
        bytes = carver.used;
    }
};

}  // namespace dqe::cuda
