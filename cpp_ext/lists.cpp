#include "lists.hpp"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "parallel.hpp"
#include "screen.hpp"

namespace dqe::cpu {
namespace {

// Tokens that lie together, some thousand at a time.
struct Piece {
    const TokenSource* source;
    int64_t item, row, count;  // its first item in the source, and its first token and how many
};

std::vector<Piece> pieces_of(const TokenSource* sources, int64_t source_count, int64_t tokens) {
    const int64_t most = std::max<int64_t>(1, Assigner::kSome / tokens);
    std::vector<Piece> pieces;
    int64_t row = 0;
    for (int64_t s = 0; s < source_count; ++s)
        for (int64_t item = 0; item < sources[s].count; item += most) {
            const int64_t count = std::min(most, sources[s].count - item) * tokens;
            pieces.push_back({sources + s, item, row, count});
            row += count;
        }
    return pieces;
}

// Consecutive pieces, and what is known of each list by them alone.
struct Run {
    size_t begin, end;
    std::vector<int64_t> places;  // how many tokens, and then where the next of them goes; the last: those without a bound
    std::vector<double> longest;
};

// Ascending by code, and by row where codes are equal: as the rows come.
void sort_by_code(uint32_t* rows, uint16_t* codes, int64_t count, std::vector<uint64_t>& scratch) {
    constexpr int64_t kFew = 96;
    scratch.resize(static_cast<size_t>(2 * count));
    uint64_t *from = scratch.data(), *to = from + count;
    for (int64_t i = 0; i < count; ++i) from[i] = uint64_t{codes[i]} << 32 | rows[i];
    if (count <= kFew) {
        std::sort(from, from + count);
    } else {
        int64_t places[2][256] = {};
        for (int64_t i = 0; i < count; ++i) ++places[0][codes[i] & 255], ++places[1][codes[i] >> 8];
        for (auto& own : places) {
            int64_t place = 0;
            for (int64_t& value : own) place += std::exchange(value, place);
        }
        for (int byte = 0; byte < 2; ++byte) {
            for (int64_t i = 0; i < count; ++i) to[places[byte][from[i] >> (32 + 8 * byte) & 255]++] = from[i];
            std::swap(from, to);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        rows[i] = static_cast<uint32_t>(from[i]);
        codes[i] = static_cast<uint16_t>(from[i] >> 32);
    }
}

}  // namespace

AlignedVector<uint8_t> codes_in_blocks(const uint8_t* codes, int64_t count, int64_t width) {
    AlignedVector<uint8_t> blocks(static_cast<size_t>((count + kPrefixRows - 1) / kPrefixRows * kPrefixRows * width), 0);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < width; ++d)
            blocks[static_cast<size_t>(r / kPrefixRows * kPrefixRows * width + d / 4 * 4 * kPrefixRows + r % kPrefixRows * 4 + d % 4)] =
                codes[r * width + d];
    return blocks;
}

void fill_lists(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const TokenTree& tree,
                const float* directions, float* longest, float* widest, int64_t* starts, uint32_t* rows, uint16_t* cosines, int threads) {
    constexpr int64_t kAhead = 6;
    const TileKernels* kernels = available_tile_kernels()[0];
    const int64_t count = tree.offsets[tree.root_count];
    const Assigner assigner(tree, width);
    const std::vector<Piece> pieces = pieces_of(sources, source_count, tokens);
    const int64_t size = pieces.empty() ? 0 : pieces.back().row + pieces.back().count;
    // Runs are written side by side, each to places of its own. A few for each thread, some of which others may slow.
    std::vector<Run> runs(std::min<size_t>(pieces.size(), threads == 1 ? 1 : static_cast<size_t>(4 * threads)));
    const std::unique_ptr<uint32_t[]> list(new uint32_t[static_cast<size_t>(size)]);  // `count`: without a bound
    const std::unique_ptr<uint16_t[]> codes(new uint16_t[static_cast<size_t>(size)]);
    struct Scratch {
        Assigner::Scratch own;
        std::vector<float> widened;
    };
    std::vector<Scratch> scratches(static_cast<size_t>(threads));
    const auto look_at = [&](const Piece& piece, Run& run, Scratch& scratch) {
        const float* values = static_cast<const float*>(piece.source->data) + piece.item * tokens * width;
        if (piece.source->half) {
            scratch.widened.resize(static_cast<size_t>(piece.count * width));
            kernels->widen(static_cast<const uint16_t*>(piece.source->data) + piece.item * tokens * width, piece.count * width,
                           scratch.widened.data());
            values = scratch.widened.data();
        }
        assigner.assign(values, piece.count, scratch.own);
        const std::vector<uint32_t>&leaves = scratch.own.leaves, &order = scratch.own.order;
        for (int64_t at = 0; at < piece.count; ++at) {
            if (at + kAhead < piece.count) {
                const float* next = directions + int64_t{leaves[static_cast<size_t>(at + kAhead)]} * width;
                for (int64_t d = 0; d < std::min<int64_t>(width, 128); d += 16) __builtin_prefetch(next + d);
            }
            const uint32_t leaf = leaves[static_cast<size_t>(at)];
            const int64_t token = order[static_cast<size_t>(at)], row = piece.row + token;
            const Products found = kernels->products(values + token * width, directions + int64_t{leaf} * width, width);
            const double norm = std::sqrt(found.with_itself);
            const bool bounded = norm <= kLargestNorm;  // not NaN either
            const uint32_t own = bounded ? leaf : static_cast<uint32_t>(count);
            list[static_cast<size_t>(row)] = own;
            codes[static_cast<size_t>(row)] =
                cosine_code(bounded && norm > 0.0 ? found.with_other / norm - 2e-6 : 1.0);  // |u| is 1 to 1e-6
            ++run.places[own];
            if (bounded) run.longest[own] = std::max(run.longest[own], norm);
        }
    };
    for_each_part(static_cast<int64_t>(runs.size()), threads, [&](int thread, int64_t r) {
        Run& run = runs[static_cast<size_t>(r)];
        run.begin = pieces.size() * static_cast<size_t>(r) / runs.size(),
        run.end = pieces.size() * static_cast<size_t>(r + 1) / runs.size();
        run.places.assign(static_cast<size_t>(count) + 1, 0);
        run.longest.assign(static_cast<size_t>(count), 0.0);
        for (size_t p = run.begin; p < run.end; ++p) look_at(pieces[p], run, scratches[static_cast<size_t>(thread)]);
    });
    int64_t place = 0;
    const auto begin_at_place = [&](size_t c) {
        for (Run& run : runs) place += std::exchange(run.places[c], place);
    };
    begin_at_place(static_cast<size_t>(count));
    for (int64_t c = 0; c <= count; ++c) {
        starts[c] = place;
        if (c < count) begin_at_place(static_cast<size_t>(c));
    }
    for_each_part(static_cast<int64_t>(runs.size()), threads, [&](int, int64_t r) {
        Run& run = runs[static_cast<size_t>(r)];
        const Piece &first = pieces[run.begin], &last = pieces[run.end - 1];
        for (int64_t row = first.row; row < last.row + last.count; ++row) {
            const int64_t at = run.places[list[static_cast<size_t>(row)]]++;
            rows[at] = static_cast<uint32_t>(row);
            cosines[at] = codes[static_cast<size_t>(row)];
        }
    });
    constexpr int64_t kLists = 64;
    for_each_part((count + kLists - 1) / kLists, threads, [&](int, int64_t part) {
        std::vector<uint64_t> scratch;
        for (int64_t c = part * kLists; c < std::min(count, (part + 1) * kLists); ++c) {
            const int64_t from = starts[c], to = starts[c + 1];
            sort_by_code(rows + from, cosines + from, to - from, scratch);
            double most = kLeastNorm;  // with less, sums that underflow could exceed Reach's slack
            for (const Run& run : runs) most = std::max(most, run.longest[static_cast<size_t>(c)]);
            longest[c] = from < to ? at_least(most) : 0.0f;
            const double cosine = from < to ? cosines[from] / 32767.5 - 1.0 : 1.0;
            widest[c] = std::nextafter(static_cast<float>(cosine), -2.0f);
        }
    });
}

}  // namespace dqe::cpu
