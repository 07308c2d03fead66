#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dqe::cpu {
namespace {

// The best of this processor: which codes and norms come out to the last bit is of no consequence, for any of them are valid.
Quantised quantise(const float* vector, int64_t width, float most_code, int8_t* codes) {
    return available_tile_kernels()[0]->quantise(vector, width, most_code, codes);
}

// The largest sum of positive numbers, or of negative ones, that enters one sum of 16 bits.
template <typename Sum, typename Number>
Sum largest_sum(const Number* numbers, int64_t width) {
    Sum largest{};
    for (int64_t first = 0; first < width; first += kSumCodes) {
        Sum sums[2][2] = {};
        for (int64_t d = first; d < std::min(first + kSumCodes, width); ++d) {
            const auto number = static_cast<Sum>(numbers[d]);
            sums[d / 2 % 2][number < 0] += std::abs(number);
        }
        for (const auto& signs : sums) largest = std::max({largest, signs[0], signs[1]});
    }
    return largest;
}

// The largest code with which no sum of 16 bits overflows: rounding adds half a code to each of its eight numbers.
float most_code(const float* query, int64_t width) {
    const double sum = largest_sum<double>(query, width), room = kMostSum - kSumCodes / 4;
    double most = 0.0;
    for (int64_t d = 0; d < width; ++d) most = std::max(most, static_cast<double>(std::abs(query[d])));
    return most > 0.0 && std::isfinite(sum) ? static_cast<float>(std::min<double>(kMostCode, room * (most / sum))) : kMostCode;
}

float error_of(const Quantised& q, int64_t width) {
    const double rounding = static_cast<double>(width + 32) * 0x1p-24;
    return at_least(q.error + rounding * (q.norm + q.coded_norm) + kLeastNorm);
}

}  // namespace

void encode_rows(const float* rows, int64_t count, int64_t width, uint8_t* codes, float* scales, float* errors, float* norms) noexcept {
    const int64_t coded_width = code_width(width);
    const auto quantise = available_tile_kernels()[0]->quantise;
    for (int64_t r = 0; r < count; ++r) {
        uint8_t* row = codes + r * coded_width;
        const Quantised q = quantise(rows + r * width, width, kMostCode, reinterpret_cast<int8_t*>(row));
        if (width < coded_width) std::fill(row + width, row + coded_width, uint8_t{0});
        for (int64_t d = 0; d < coded_width; ++d) row[d] ^= 0x80;  // code + 128
        scales[r] = q.scale;
        errors[r] = error_of(q, width);
        norms[r] = at_least(q.coded_norm);
    }
}

void encode_query(const float* query, int64_t width, bool short_sums, int8_t* codes, int32_t& offset, float& scale, float& norm,
                  float& error) noexcept {
    Quantised q = quantise(query, width, short_sums ? most_code(query, width) : kMostCode, codes);
    if (short_sums && largest_sum<int32_t>(codes, width) > kMostSum) {  // numbers so small that their scale is not a normal one
        std::fill_n(codes, width, int8_t{0});
        q = {0.0f, q.norm, 0.0, q.norm};
    }
    std::fill(codes + width, codes + code_width(width), int8_t{0});
    offset = -128 * std::accumulate(codes, codes + width, int32_t{0});
    scale = q.scale;
    norm = at_least(std::max(std::max(q.norm, q.coded_norm), kLeastNorm));
    error = error_of(q, width);
}

}  // namespace dqe::cpu
