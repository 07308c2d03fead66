#include "prefix.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
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
    const auto source_of = [&](int64_t row) {
        return static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), row) - starts.begin()) - 1;
    };
    // Rows of another order are scattered: those of the next block are on their way while one is encoded.
    const auto prefetch = [&](int64_t from) {
        for (int64_t r = from; order && r < std::min(from + kPrefixRows, starts.back()); ++r) {
            const TokenSource& source = sources[source_of(order[r])];
            const int64_t bytes = width * (source.half ? 2 : 4);
            const char* row = static_cast<const char*>(source.data) + (order[r] - starts[source_of(order[r])]) * bytes;
            for (int64_t d = 0; d < std::min<int64_t>(bytes, 512); d += 64) __builtin_prefetch(row + d);
        }
    };
    const auto encode = [&](int64_t number, AlignedVector<float>& items, AlignedVector<float>& rotated, std::vector<float>& turned) {
        const int64_t first = number * kPrefixRows, rows = std::min(kPrefixRows, starts.back() - first);
        prefetch(first + kPrefixRows);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = order ? order[first + r] : first + r;
            const size_t source = source_of(row);
            const int64_t at = (row - starts[source]) * width;
            float* to = items.data() + r * width;
            if (sources[source].half)
                kernels->widen(static_cast<const uint16_t*>(sources[source].data) + at, width, to);
            else
                std::memcpy(to, static_cast<const float*>(sources[source].data) + at, static_cast<size_t>(width) * sizeof(float));
        }
        for (int64_t panel = 0; panel < count / lanes; ++panel) {
            const Ahead nothing = {reinterpret_cast<const char*>(items.data()), 0, 0, 1};
            kernels->dot_panel({items.data(), rows, width}, panels.data() + panel * width * lanes, lanes, nothing,
                               rotated.data() + panel * kPrefixRows * lanes);
            for (int64_t r = 0; r < rows; ++r)
                std::copy_n(rotated.begin() + (panel * kPrefixRows + r) * lanes, lanes, turned.begin() + r * count + panel * lanes);
        }
        double norms[kPrefixRows];
        bool bounded[kPrefixRows];
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = items.data() + r * width;
            norms[r] = std::sqrt(kernels->products(row, row, width).with_itself);
            bounded[r] = norms[r] <= kLargestNorm;
        }
        const auto at = [&](int64_t r, int64_t p) { return turned[static_cast<size_t>(r * count + p)]; };
        float largest = 0.0f;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t p = 0; p < count && bounded[r]; ++p) largest = std::max(largest, std::abs(at(r, p)));
        uint8_t* codes = blocks + number * prefix_block_bytes(count) + sizeof(PrefixHeader);
        std::memset(codes, 0x80, static_cast<size_t>(kPrefixRows * count));
        const float scale = largest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        double rests[kPrefixRows] = {}, error = kLeastNorm, coded_norm = 0.0;
        for (int64_t r = 0; r < rows; ++r) {
            if (!bounded[r]) {
                error = std::numeric_limits<double>::quiet_NaN();
                continue;
            }
            double square = 0.0, coded_square = 0.0, left_square = 0.0;
            for (int64_t p = 0; p < count; ++p) {
                // Any code is valid: the error is that of the code which is stored. An infinite inverse times 0 is NaN: code 127.
                float scaled = at(r, p) * inverse;
                scaled = scaled < 127.0f ? scaled : 127.0f;
                scaled = scaled > -127.0f ? scaled : -127.0f;
                const float rounded = (scaled + 0x1.8p23f) - 0x1.8p23f;
                codes[p / 4 * 4 * kPrefixRows + r * 4 + p % 4] = static_cast<uint8_t>(static_cast<int>(rounded) + 128);
                const double value = at(r, p), coded = double{rounded} * scale, left = value - coded;
                square += value * value, coded_square += coded * coded, left_square += left * left;
            }
            const double own = std::sqrt(coded_square);
            error = std::isnan(error) ? error : std::max(error, std::sqrt(left_square) + off * norms[r] + room * (norms[r] + own));
            coded_norm = std::max(coded_norm, own);
            rests[r] = rest_of(norms[r], std::sqrt(square), off * norms[r]) + room * norms[r];
        }
        PrefixHeader header = {scale, at_least(error), at_least(coded_norm), 0.0f, {}, {}};
        header.rest_unit = at_least(*std::max_element(rests, rests + kPrefixRows) / 65535.0);
        for (int64_t r = 0; r < rows; ++r)
            header.rests[r] = static_cast<uint16_t>(std::min(std::ceil(rests[r] / header.rest_unit), 65535.0));
        std::memcpy(codes - sizeof(PrefixHeader), &header, sizeof header);
    };
    constexpr int64_t kSome = 64;
    const int64_t blocks_in_all = prefix_blocks(starts.back());
    for_each_part((blocks_in_all + kSome - 1) / kSome, threads, [&](int, int64_t part) {
        AlignedVector<float> items(static_cast<size_t>(kPrefixRows * width)), rotated(static_cast<size_t>(kPrefixRows * count));
        std::vector<float> turned(rotated.size());
        for (int64_t b = part * kSome; b < std::min((part + 1) * kSome, blocks_in_all); ++b) encode(b, items, rotated, turned);
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
            at_least(std::max(q.error + off, kLeastNorm)),
            at_least(std::max(rest_of(norm, q.norm, off), kLeastNorm))};
}

}  // namespace dqe::cpu
