// One instruction set's kernels against plain loops, each alone; and what sweep_test.cpp draws its cases with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "../tiles.hpp"

namespace {

using namespace dqe::cpu;

thread_local std::mt19937_64 generator(1);  // a caller's own

int64_t any_of(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }

void expect(bool holds, const TileKernels* kernels, const char* what) {
    if (holds) return;
    std::printf("%s: %s\n", kernels->name, what);
    std::fflush(stdout);
    std::_Exit(1);  // other callers may be at work
}

// Whole numbers, so that every instruction set must find the same centre, the first of equals.
void check_nearest(const TileKernels* kernels) {
    const int64_t width = any_of({4, 8, 16}), count = any_of({1, 5, 6, 7, 40}), panels = any_of({1, 3}), lanes = kernels->wide;
    std::vector<uint8_t> points(count * width);
    std::vector<int8_t> codes(panels * width * lanes);
    std::vector<int32_t> offsets(panels * lanes);
    for (auto& code : points) code = any_of({1, 2, 64, 127});
    for (auto& code : codes) code = any_of({-127, -1, 0, 127});
    for (auto& offset : offsets) offset = any_of({-1000, 0, 0, 5});
    std::vector<uint32_t> found(count);
    kernels->nearest(points.data(), count, width, {codes.data(), offsets.data(), panels}, found.data());
    for (int64_t i = 0; i < count; ++i) {
        int64_t best = std::numeric_limits<int64_t>::min(), nearest = 0;
        for (int64_t c = 0; c < panels * lanes; ++c) {
            int64_t product = offsets[c];
            for (int64_t d = 0; d < width; ++d)
                product += points[i * width + d] * codes[c / lanes * width * lanes + d / 4 * 4 * lanes + c % lanes * 4 + d % 4];
            if (product > best) best = product, nearest = c;
        }
        expect(found[i] == nearest, kernels, "nearest: another centre");
    }
}

void check_prefix_codes(const TileKernels* kernels) {
    const int64_t width = any_of({16, 48});
    std::vector<float> rows(kPrefixRows * width);
    std::normal_distribution<float> normal;
    for (float& number : rows) number = generator() % 8 ? normal(generator) : 0.0f;
    std::vector<uint8_t> codes(rows.size());
    PrefixSums sums;
    kernels->encode_prefix(rows.data(), width, codes.data(), &sums);
    for (int64_t r = 0; r < kPrefixRows; ++r) {
        double whole = 0.0, coded = 0.0, left = 0.0;
        for (int64_t p = 0; p < width; ++p) {
            const double number = rows[r * width + p], stored = (codes[p / 4 * 4 * kPrefixRows + r * 4 + p % 4] - 128.0) * sums.scale;
            expect(std::abs(number - stored) <= 0.501 * sums.scale, kernels, "encode_prefix: not the nearest code");
            whole += number * number, coded += stored * stored, left += (number - stored) * (number - stored);
        }
        const auto equal = [](double one, double other) { return std::abs(one - other) <= 1e-9 * (one + other); };
        expect(equal(whole, sums.whole[r]) && equal(coded, sums.coded[r]) && equal(left, sums.left[r]), kernels, "encode_prefix: sums");
    }
    std::vector<float> squares(kPrefixRows);
    kernels->squares({rows.data(), kPrefixRows, width}, squares.data());
    for (int64_t r = 0; r < kPrefixRows; ++r)
        expect(std::abs(squares[r] - sums.whole[r]) <= static_cast<double>(width) * 0x1p-24 * sums.whole[r], kernels, "squares");
}

// Products of codes, with scales of one and no errors: bounds and estimates are whole numbers then, which float32 holds.
void check_products_of_codes(const TileKernels* kernels) {
    const int64_t width = 64 * any_of({1, 3}), count = any_of({1, 4, 7, 8, 16, 33}), most = kernels->short_sums ? 16 : 127;
    const int lanes = static_cast<int>(any_of({kernels->wide, kernels->narrow}));
    std::vector<uint8_t> codes(count * width);
    std::vector<int8_t> queries(lanes * width), panel(lanes * width);
    std::vector<int32_t> offsets(lanes);
    for (auto& code : codes) code = static_cast<uint8_t>(1 + generator() % 255);
    for (int64_t i = 0; i < lanes * width; ++i) {
        const int64_t lane = i / width, d = i % width;
        queries[i] = static_cast<int8_t>(static_cast<int64_t>(generator() % (2 * most + 1)) - most);
        panel[(d / 4 * lanes + lane) * 4 + d % 4] = queries[i];
        offsets[lane] -= 128 * queries[i];
    }
    const auto product = [&](int64_t r, int64_t lane) {
        int32_t sum = 0;
        for (int64_t d = 0; d < width; ++d) sum += (codes[r * width + d] - 128) * queries[lane * width + d];
        return static_cast<float>(sum);
    };
    const std::vector<float> ones(count + lanes, 1.0f), nothing(count + lanes);
    const CodedRows rows = {codes.data(), ones.data(), nothing.data(), nothing.data(), count, width};
    CodedQueries coded = {queries.data(), offsets.data(), ones.data(), nothing.data(), nothing.data()};
    std::vector<float> found(count * lanes), thresholds(lanes);
    kernels->bound_rows(rows, coded, kernels->max_row_queries, found.data(), count);
    for (int64_t at = 0; at < count * kernels->max_row_queries; ++at)
        expect(found[at] == product(at % count, at / count), kernels, "bound_rows");
    if (!kernels->find_bounded) return;
    coded.codes = panel.data();
    kernels->estimate_panel(rows, coded, lanes, found.data());
    for (float& threshold : thresholds) threshold = static_cast<float>(any_of({-100000, 0, 20000}));
    std::vector<Bounded> reached(count * lanes);
    reached.resize(kernels->find_bounded(rows, coded, lanes, thresholds.data(), reached.data()));
    auto next = reached.begin();
    for (int64_t at = 0; at < count * lanes; ++at) {
        const float own = product(at / lanes, at % lanes);
        expect(found[at] == own, kernels, "estimate_panel");
        if (own < thresholds[at % lanes]) continue;
        expect(next != reached.end() && next->position == at && next->bound == own, kernels, "find_bounded");
        ++next;
    }
    expect(next == reached.end(), kernels, "find_bounded: too many");
}

// The same of a prefix's blocks, whose rests count too.
void check_prefixed(const TileKernels* kernels) {
    const int64_t width = any_of({16, 48}), count = any_of({1, 3}), bytes = sizeof(PrefixHeader) + kPrefixRows * width;
    std::vector<uint8_t> blocks(count * bytes);
    std::vector<int8_t> query(width);
    PrefixQuery coded = {query.data(), 0, 1.0f, 0.0f, 0.0f, 1.0f};
    for (auto& byte : blocks) byte = static_cast<uint8_t>(1 + generator() % 255);
    for (auto& code : query) coded.offset -= 128 * (code = static_cast<int8_t>(static_cast<int64_t>(generator() % 255) - 127));
    std::vector<uint32_t> expected, found(count * kPrefixRows);
    const float threshold = static_cast<float>(any_of({0, 40000, 60000}));
    for (int64_t block = 0; block < count; ++block) {
        PrefixHeader header = {1.0f, 0.0f, 0.0f, 1.0f, {}, {}};
        for (auto& rest : header.rests) rest = static_cast<uint16_t>(generator());
        std::memcpy(blocks.data() + block * bytes, &header, sizeof header);
        for (int64_t r = 0; r < kPrefixRows; ++r) {
            int32_t sum = header.rests[r];
            for (int64_t d = 0; d < width; ++d)
                sum += (blocks[block * bytes + sizeof header + d / 4 * 4 * kPrefixRows + 4 * r + d % 4] - 128) * query[d];
            if (static_cast<float>(sum) >= threshold) expected.push_back(static_cast<uint32_t>(block * kPrefixRows + r));
        }
    }
    found.resize(kernels->find_prefixed(blocks.data(), count, width, coded, threshold, found.data()));
    expect(found == expected, kernels, "find_prefixed");
}

}  // namespace
