#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dqe::cpu {
namespace {

// The best of this processor: which codes and norms come out to the last bit is of no consequence, for any of them are valid.
Quantised quantise(const float* vector, int64_t width, int8_t* codes) {
    return available_tile_kernels()[0]->quantise(vector, width, codes);
}

float error_of(const Quantised& q, int64_t width) {
    const double rounding = static_cast<double>(width + 32) * 0x1p-24;
    return at_least(std::max(q.error + rounding * (q.norm + q.coded_norm), kLeastNorm));
}

}  // namespace

void encode_rows(const float* rows, int64_t count, int64_t width, uint8_t* codes, float* scales, float* errors, float* norms) noexcept {
    const int64_t coded_width = code_width(width);
    for (int64_t r = 0; r < count; ++r) {
        uint8_t* row = codes + r * coded_width;
        const Quantised q = quantise(rows + r * width, width, reinterpret_cast<int8_t*>(row));
        std::fill(row + width, row + coded_width, uint8_t{0});
        for (int64_t d = 0; d < coded_width; ++d) row[d] ^= 0x80;  // code + 128
        scales[r] = q.scale;
        errors[r] = error_of(q, width);
        norms[r] = at_least(q.coded_norm);
    }
}

void encode_query(const float* query, int64_t width, int8_t* codes, int32_t& offset, float& scale, float& norm, float& error) noexcept {
    const Quantised q = quantise(query, width, codes);
    std::fill(codes + width, codes + code_width(width), int8_t{0});
    offset = -128 * std::accumulate(codes, codes + width, int32_t{0});
    scale = q.scale;
    norm = at_least(std::max(std::max(q.norm, q.coded_norm), kLeastNorm));
    error = error_of(q, width);
}

}  // namespace dqe::cpu
