#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dqe::cpu {
namespace {

struct Quantised {
    float scale;
    double norm, coded_norm, error;  // |c|, |ĉ|, |c - ĉ|
};

// Beyond this norm, products and partial sums could overflow float32; below it, none of what enters a bound or a score can.
constexpr double kLargestNorm = 0x1p60;

// Calls put(d, code) for each entry; all norms NaN where an entry is not finite, or the whole too large.
template <typename Put>
Quantised quantise(const float* vector, int64_t width, const Put& put) {
    float largest = 0.0f;
    double square = 0.0;
    for (int64_t d = 0; d < width; ++d) {
        square += static_cast<double>(vector[d]) * vector[d];
        largest = std::max(largest, std::fabs(vector[d]));
    }
    if (!(square <= kLargestNorm * kLargestNorm)) {
        for (int64_t d = 0; d < width; ++d) put(d, 0);
        const double nothing = std::numeric_limits<double>::quiet_NaN();
        return {0.0f, nothing, nothing, nothing};
    }
    const float scale = largest / 127.0f;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    double coded_norm = 0.0, error = 0.0;
    for (int64_t d = 0; d < width; ++d) {
        // Any code is valid: the error norm is taken of what it really leaves. An infinite inverse times 0 is NaN: code 0.
        const float scaled = vector[d] * inverse;
        const int code = scaled == scaled ? static_cast<int>(std::nearbyint(std::clamp(scaled, -127.0f, 127.0f))) : 0;
        put(d, code);
        const double value = vector[d], coded = double{scale} * code;
        coded_norm += coded * coded;
        error += (value - coded) * (value - coded);
    }
    return {scale, std::sqrt(square), std::sqrt(coded_norm), std::sqrt(error)};
}

// Rounded up, with room for the rounding of the sums above (relative 2^-40 at most).
float at_least(double value) { return std::nextafter(static_cast<float>(value * (1.0 + 0x1p-30)), std::numeric_limits<float>::infinity()); }

// A product of two of these is a normal number, far above what underflow can take from a score.
constexpr double kLeastNorm = 1e-18;

float error_of(const Quantised& q, int64_t width) {
    const double rounding = static_cast<double>(width + 32) * 0x1p-24;
    return at_least(std::max(q.error + rounding * (q.norm + q.coded_norm), kLeastNorm));
}

}  // namespace

void encode_rows(const float* rows, int64_t count, int64_t width, uint8_t* codes, float* scales, float* errors, float* norms) noexcept {
    const int64_t coded_width = code_width(width);
    for (int64_t r = 0; r < count; ++r) {
        uint8_t* row = codes + r * coded_width;
        const Quantised q = quantise(rows + r * width, width, [&](int64_t d, int code) { row[d] = static_cast<uint8_t>(code + 128); });
        std::fill(row + width, row + coded_width, uint8_t{128});
        scales[r] = q.scale;
        errors[r] = error_of(q, width);
        norms[r] = at_least(q.coded_norm);
    }
}

void encode_query(const float* query, int64_t width, int8_t* codes, int32_t& offset, float& scale, float& norm, float& error) noexcept {
    int32_t sum = 0;
    const Quantised q = quantise(query, width, [&](int64_t d, int code) {
        codes[d] = static_cast<int8_t>(code);
        sum += code;
    });
    std::fill(codes + width, codes + code_width(width), int8_t{0});
    offset = -128 * sum;
    scale = q.scale;
    norm = at_least(std::max(std::max(q.norm, q.coded_norm), kLeastNorm));
    error = error_of(q, width);
}

}  // namespace dqe::cpu
