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
                 uint8_t* blocks, int threads) {
    const TileKernels* kernels = available_tile_kernels()[0];
    const int lanes = kernels->narrow;
    AlignedVector<float> panels(static_cast<size_t>(count * width));  // [count / lanes][width][lanes]
    for (int64_t p = 0; p < count; ++p)
        for (int64_t d = 0; d < width; ++d) panels[static_cast<size_t>((p / lanes * width + d) * lanes + p % lanes)] = axes[p * width + d];
    std::vector<int64_t> starts(static_cast<size_t>(source_count) + 1, 0);
    for (int64_t s = 0; s < source_count; ++s)
        starts[static_cast<size_t>(s) + 1] = starts[static_cast<size_t>(s)] + sources[s].count * tokens;
    const double off = kSkew + std::sqrt(static_cast<double>(count)) * static_cast<double>(width + 2) * 0x1p-24, room = slack(width);
    struct Scratch {
        std::vector<float> rows, rotated, own;
        std::vector<int8_t> codes;
    };
    std::vector<Scratch> scratches(static_cast<size_t>(threads));
    for_each_part(prefix_blocks(starts.back()), threads, [&](int thread, int64_t number) {
        Scratch& scratch = scratches[static_cast<size_t>(thread)];
        scratch.rows.resize(static_cast<size_t>(kPrefixRows * width));
        scratch.rotated.resize(static_cast<size_t>(kPrefixRows * count));
        scratch.own.resize(static_cast<size_t>(count));
        scratch.codes.resize(static_cast<size_t>(count));
        uint8_t* block = blocks + number * prefix_block_bytes(count);
        float* numbers = reinterpret_cast<float*>(block);
        uint8_t* codes = block + kPrefixRows * 16;
        std::memset(block, 0, static_cast<size_t>(prefix_block_bytes(count)));
        const int64_t first = number * kPrefixRows, rows = std::min(kPrefixRows, starts.back() - first);
        for (int64_t r = 0; r < rows; ++r) {
            const auto source = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), first + r) - starts.begin()) - 1;
            const int64_t at = (first + r - starts[source]) * width;
            float* to = scratch.rows.data() + r * width;
            if (sources[source].half)
                kernels->widen(static_cast<const uint16_t*>(sources[source].data) + at, width, to);
            else
                std::memcpy(to, static_cast<const float*>(sources[source].data) + at, static_cast<size_t>(width) * sizeof(float));
        }
        for (int64_t panel = 0; panel < count / lanes; ++panel) {
            const Ahead nothing = {reinterpret_cast<const char*>(scratch.rows.data()), 0, 0, 1};
            kernels->dot_panel({scratch.rows.data(), rows, width}, panels.data() + panel * width * lanes, lanes, nothing,
                               scratch.rotated.data() + panel * kPrefixRows * lanes);
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t p = 0; p < count; ++p)
                scratch.own[static_cast<size_t>(p)] =
                    scratch.rotated[static_cast<size_t>(p / lanes * kPrefixRows * lanes + r * lanes + p % lanes)];
            const float* row = scratch.rows.data() + r * width;
            const double norm = std::sqrt(kernels->products(row, row, width).with_itself);
            Quantised q = kernels->quantise(scratch.own.data(), count, scratch.codes.data());
            if (!(norm <= kLargestNorm)) {
                std::fill(scratch.codes.begin(), scratch.codes.end(), int8_t{0});
                q = {0.0f, norm, 0.0, std::numeric_limits<double>::quiet_NaN()};
            }
            numbers[r] = q.scale;
            numbers[kPrefixRows + r] = at_least(std::max(q.error + off * norm + room * (norm + q.coded_norm), kLeastNorm));
            numbers[2 * kPrefixRows + r] = at_least(q.coded_norm);
            numbers[3 * kPrefixRows + r] = at_least(rest_of(norm, q.norm, off * norm) + room * norm);
            for (int64_t p = 0; p < count; ++p)
                codes[p / 4 * 4 * kPrefixRows + r * 4 + p % 4] =
                    static_cast<uint8_t>(static_cast<uint8_t>(scratch.codes[static_cast<size_t>(p)]) ^ 0x80);
        }
    });
}

PrefixQuery encode_prefix_query(const float* query, int64_t width, const float* axes, int64_t count, int8_t* codes) {
    const TileKernels* kernels = available_tile_kernels()[0];
    std::vector<float> rotated(static_cast<size_t>(count));
    for (int64_t p = 0; p < count; ++p)
        rotated[static_cast<size_t>(p)] = static_cast<float>(kernels->products(axes + p * width, query, width).with_other);
    const double norm = std::sqrt(kernels->products(query, query, width).with_itself), off = 2.0 * kSkew * norm;
    Quantised q = kernels->quantise(rotated.data(), count, codes);
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
