#include "prefix.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "aligned.hpp"
#include "parallel.hpp"
#include "screen.hpp"

namespace dqe::cpu {
namespace {

double slack(int64_t width) { return static_cast<double>(width + 64) * 0x1p-24; }

// At least |c2|, from |c|, what was computed for |Ec|, and how far that can be off.
double rest_of(double norm, double prefix, double off) {
    const double least = std::max(0.0, prefix - off);
    return std::sqrt(std::max(0.0, norm * norm - least * least));
}

uint16_t rounded_up(double value) {
    const auto whole = static_cast<int64_t>(std::min(value, 65535.0));
    return static_cast<uint16_t>(whole + (whole < value && whole < 65535));
}

}  // namespace

double skew(const float* axes, int64_t count, int64_t width) {
    const TileKernels* kernels = available_tile_kernels()[0];
    double square = 0.0;
    for (int64_t a = 0; a < count; ++a)
        for (int64_t b = 0; b <= a; ++b) {
            const double off = kernels->products(axes + a * width, axes + b * width, width).with_other - (a == b ? 1.0 : 0.0);
            square += (a == b ? 1.0 : 2.0) * off * off;
        }
    return std::sqrt(square);
}

void fill_prefix(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const float* axes, int64_t count,
                 const uint32_t* order, uint8_t* blocks, int threads) {
    const TileKernels* kernels = available_tile_kernels()[0];
    const int lanes = kernels->narrow;
    AlignedVector<float> panels(static_cast<size_t>(count * width));  // [count / lanes][width][lanes]
    for (int64_t p = 0; p < count; ++p)
        for (int64_t d = 0; d < width; ++d) panels[static_cast<size_t>((p / lanes * width + d) * lanes + p % lanes)] = axes[p * width + d];
    std::vector<int64_t> starts(static_cast<size_t>(source_count) + 1, 0);
    for (int64_t s = 0; s < source_count; ++s)
        starts[static_cast<size_t>(s) + 1] = starts[static_cast<size_t>(s)] + sources[s].count * tokens;
    const double off = kSkew + std::sqrt(static_cast<double>(count)) * static_cast<double>(width + 2) * 0x1p-24, room = slack(width);
    const double square_at_most = 1.0 + static_cast<double>(width + 2) * 0x1p-23;  // times what was added up in float32
    const auto source_of = [&](int64_t row) {
        return static_cast<size_t>(std::upper_bound(starts.begin() + 1, starts.end() - 1, row) - starts.begin()) - 1;
    };
    struct Scratch {
        AlignedVector<float> items, rotated, turned, squares;
    };
    // Rows of another order are scattered: those of the next block are asked for while one is encoded, a quarter at each step, since memory
    // answers no more at once.
    const auto prefetch = [&](int64_t from) {
        for (int64_t r = from; order && r < std::min(from + kPrefixRows / 4, starts.back()); ++r) {
            const size_t at = source_of(order[r]);
            const int64_t bytes = width * (sources[at].half ? 2 : 4);
            const char* row = static_cast<const char*>(sources[at].data) + (order[r] - starts[at]) * bytes;
            for (int64_t d = 0; d < std::min<int64_t>(bytes, 512); d += 64) __builtin_prefetch(row + d);
        }
    };
    const auto encode = [&](int64_t number, Scratch& scratch) {
        const int64_t first = number * kPrefixRows, rows = std::min(kPrefixRows, starts.back() - first);
        int64_t ahead = first + kPrefixRows;
        const auto prefetch_some = [&] { prefetch(std::exchange(ahead, ahead + kPrefixRows / 4)); };
        prefetch_some();
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = order ? order[first + r] : first + r;
            const size_t source = source_of(row);
            const int64_t at = (row - starts[source]) * width;
            float* to = scratch.items.data() + r * width;
            if (sources[source].half)
                kernels->widen(static_cast<const uint16_t*>(sources[source].data) + at, width, to);
            else
                std::memcpy(to, static_cast<const float*>(sources[source].data) + at, static_cast<size_t>(width) * sizeof(float));
        }
        prefetch_some();
        const Rows own = {scratch.items.data(), rows, width};
        kernels->squares(own, scratch.squares.data());
        double squares[kPrefixRows] = {}, most = 0.0;
        bool bounded[kPrefixRows] = {}, all = true;
        for (int64_t r = 0; r < rows; ++r) {
            // More than rounding and underflow take.
            squares[r] = square_at_most * scratch.squares[static_cast<size_t>(r)] + kLeastNorm * kLeastNorm;
            bounded[r] = squares[r] <= kLargestNorm * kLargestNorm;
            all = all && bounded[r];
            if (bounded[r]) most = std::max(most, squares[r]);
        }
        prefetch_some();
        for (int64_t panel = 0; panel < count / lanes; ++panel) {
            const Ahead nothing = {reinterpret_cast<const char*>(scratch.items.data()), 0, 0, 1};
            float* rotated = (count == lanes ? scratch.turned : scratch.rotated).data();
            kernels->dot_panel(own, panels.data() + panel * width * lanes, lanes, nothing, rotated);
            for (int64_t r = 0; r < rows && count > lanes; ++r)
                std::copy_n(rotated + r * lanes, lanes, scratch.turned.begin() + r * count + panel * lanes);
        }
        for (int64_t r = 0; r < kPrefixRows; ++r)
            if (!bounded[r]) std::fill_n(scratch.turned.begin() + r * count, count, 0.0f);
        prefetch_some();
        uint8_t* to = blocks + number * prefix_block_bytes(count);
        PrefixSums sums;
        kernels->encode_prefix(scratch.turned.data(), count, to + sizeof(PrefixHeader), &sums);
        // With |c'| <= (1 + ω) |c|, |c|² - max(0, |c'| - ω |c|)² is at most (1 + 2 ω (1 + ω)) |c|² - |c'|².
        const double norm = std::sqrt(most);
        double rests[kPrefixRows] = {}, largest = 0.0;
        for (int64_t r = 0; r < rows; ++r) {
            if (!bounded[r]) continue;
            rests[r] = std::sqrt(std::max(0.0, (1.0 + 3.0 * off) * squares[r] - sums.whole[r])) + room * norm;
            largest = std::max(largest, rests[r]);
        }
        const double coded = std::sqrt(*std::max_element(sums.coded, sums.coded + kPrefixRows));
        const double left = std::sqrt(*std::max_element(sums.left, sums.left + kPrefixRows)) + off * norm + room * (norm + coded);
        const double error = all ? std::max(left, kLeastNorm) : std::numeric_limits<double>::quiet_NaN();
        PrefixHeader header = {sums.scale, at_least(error), at_least(coded), 0.0f, {}, {}};
        header.rest_unit = at_least(largest / 65535.0);
        const double inverse = (1.0 + 0x1p-50) / header.rest_unit;  // rounds up
        for (int64_t r = 0; r < rows; ++r) header.rests[r] = rounded_up(rests[r] * inverse);
        std::memcpy(to, &header, sizeof header);
    };
    constexpr int64_t kSome = 64;
    const int64_t blocks_in_all = prefix_blocks(starts.back());
    for_each_part((blocks_in_all + kSome - 1) / kSome, threads, [&](int, int64_t part) {
        const auto numbers = [](int64_t size) { return AlignedVector<float>(static_cast<size_t>(kPrefixRows * size)); };
        Scratch scratch = {numbers(width), numbers(lanes), numbers(count), numbers(1)};
        for (int64_t b = part * kSome; b < std::min((part + 1) * kSome, blocks_in_all); ++b) encode(b, scratch);
    });
}

PrefixQuery encode_prefix_query(const float* query, int64_t width, const float* axes, int64_t count, int8_t* codes) {
    const TileKernels* kernels = available_tile_kernels()[0];
    std::vector<float> rotated(static_cast<size_t>(count));
    for (int64_t p = 0; p < count; ++p)
        rotated[static_cast<size_t>(p)] = static_cast<float>(kernels->products(axes + p * width, query, width).with_other);
    const double norm = std::sqrt(kernels->products(query, query, width).with_itself), off = 2.0 * kSkew * norm;
    Quantised q = kernels->quantise(rotated.data(), count, kMostCode, codes);
    if (!(norm <= kLargestNorm)) {
        std::fill_n(codes, count, int8_t{0});
        q = {0.0f, norm, 0.0, std::numeric_limits<double>::quiet_NaN()};
    }
    const int32_t offset = -128 * std::accumulate(codes, codes + count, int32_t{0});
    return {codes,
            offset,
            q.scale,
            at_least(std::max(std::max(q.norm + off, q.coded_norm), kLeastNorm)),
            at_least(q.error + off + kLeastNorm),
            at_least(std::max(rest_of(norm, q.norm, off), kLeastNorm))};
}

}  // namespace dqe::cpu
