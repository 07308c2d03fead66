// 8-bit copies of vectors on the device. cpp_ext/screen.hpp has the inequality that they serve, and says what codes, scales, errors and
// norms are; codes and scales are the same here to the bit. What differs is how far a score may be from the inner product: see
// `rounding_of`.
#pragma once

#include "ptx.hpp"
#include "scan.hpp"
#include "screening.hpp"

namespace dqe::cuda {

constexpr double kLargestNorm = 0x1p60, kLeastNorm = 1e-18;  // as on the CPU
constexpr int64_t kMostCodedWidth = 65536;                   // wider rows could overflow the 32-bit sums of products

// The largest error of a score, as a part of |query| |item|, and of the arithmetic of its bound. An instruction m16n8k16 adds 17 terms;
// each is taken to be cut off at the last of 24 bits of the largest, and so is their sum: 18 * 2^-23 for each 16 coordinates, twice for
// queries in two parts, which is 4.5 * 2^-24 for each coordinate. 8 leave room for the split of a query (4 * 2^-24 in all) and the bound's
// own float32.
__host__ __device__ constexpr double rounding_of(int64_t width) { return static_cast<double>(width + 64) * 8 * 0x1p-24; }

// Rounded up, with room for the rounding of the sums that it comes from.
__device__ inline float at_least(double value) {
    return nextafterf(static_cast<float>(value * (1.0 + 0x1p-30)), __uint_as_float(0x7F800000));
}

struct CodedNumbers {
    float scale, error, norm;  // of an item: norm is |scale * codes|
    float query_norm;          // what a query's bound takes: the larger of that and of the vector's own norm
};

// By one warp: `coordinate(d)` for d below `width`, `put(d, code)`. All norms are NaN and codes zero where a coordinate is not finite or
// the norm is above kLargestNorm: such a vector has no bound.
template <typename Coordinate, typename Put>
__device__ CodedNumbers encode(int64_t width, const Coordinate& coordinate, const Put& put) {
    const int lane = threadIdx.x % 32;
    const auto sum = [](double value) {
        for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
        return value;
    };
    float most = 0.0f;
    double squares = 0.0;
    for (int64_t d = lane; d < width; d += 32) {
        const float x = coordinate(d);
        most = fmaxf(most, fabsf(x)), squares += static_cast<double>(x) * x;
    }
    for (int distance = 16; distance > 0; distance /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, distance));
    squares = sum(squares);
    if (!(squares <= kLargestNorm * kLargestNorm)) {
        for (int64_t d = lane; d < width; d += 32) put(d, 0);
        const float nothing = __uint_as_float(0x7FC00000);
        return {0.0f, nothing, nothing, nothing};
    }
    const float scale = most / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    double coded_squares = 0.0, left_squares = 0.0;
    for (int64_t d = lane; d < width; d += 32) {
        const float x = coordinate(d);
        float scaled = x * inverse;  // an infinite inverse times 0 is NaN: code 127; any code is valid
        scaled = scaled < 127.0f ? scaled : 127.0f;
        scaled = scaled > -127.0f ? scaled : -127.0f;
        const float rounded = (scaled + 0x1.8p23f) - 0x1.8p23f;
        put(d, static_cast<int>(rounded));
        const double coded = static_cast<double>(rounded) * scale, left = x - coded;
        coded_squares += coded * coded, left_squares += left * left;
    }
    const double norm = sqrt(squares), coded_norm = sqrt(sum(coded_squares));
    const double error = sqrt(sum(left_squares)) + rounding_of(width) * (norm + coded_norm);
    return {scale, at_least(fmax(error, kLeastNorm)), at_least(coded_norm), at_least(fmax(fmax(norm, coded_norm), kLeastNorm))};
}

// A warp for each of `count` rows; `pitch` bytes of codes a row, zeros after `width`. Numbers are read two at a time: an odd last one has
// zeros beside it, in the padding of coded_at().
__global__ void encode_items(const void* items, bool half, int64_t count, int64_t width, int64_t pitch, CodedItems coded) {
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (row >= count) return;
    int8_t* codes = coded.codes + row * pitch;
    const CodedNumbers numbers = encode(
        width,
        [&](int64_t d) {
            const int64_t at = row * width + d;
            return half ? half_to_float(static_cast<const uint16_t*>(items)[at]) : static_cast<const float*>(items)[at];
        },
        [&](int64_t d, int code) { codes[d] = static_cast<int8_t>(code); });
    for (int64_t d = width + threadIdx.x % 32; d < pitch; d += 32) codes[d] = 0;
    if (threadIdx.x % 32) return;
    coded.scales[row] = numbers.scale, coded.errors[row] = numbers.error, coded.norms[row] = numbers.norm;
    if (row + 1 == count && count % 2) coded.scales[count] = coded.errors[count] = coded.norms[count] = 0.0f;
}

// By one warp, a row of the query tiles, as in prepare_query. A query without a bound cannot be screened, and `failed` says so.
__device__ inline void encode_query(const void* queries, bool half, int64_t batch, int64_t width, int64_t query, int rows, int chunks,
                                    const CodedQueries& coded, volatile unsigned* failed) {
    unsigned char* row = coded.codes + (query / rows * chunks * rows + query % rows) * kChunkBytes;
    const auto put = [&](int64_t d, int code) {
        row[d / kChunkBytes * rows * kChunkBytes + d % kChunkBytes] = static_cast<unsigned char>(code);
    };
    for (int64_t d = (query < batch ? width : 0) + threadIdx.x; d < int64_t{chunks} * kChunkBytes; d += 32) put(d, 0);
    if (query >= batch) return;
    const CodedNumbers numbers = encode(
        width,
        [&](int64_t d) {
            const int64_t at = query * width + d;
            return half ? half_to_float(static_cast<const uint16_t*>(queries)[at]) : static_cast<const float*>(queries)[at];
        },
        put);
    if (threadIdx.x) return;
    coded.scales[query] = numbers.scale, coded.errors[query] = numbers.error, coded.norms[query] = numbers.query_norm;
    if (numbers.error != numbers.error) *failed = 1;
}

}  // namespace dqe::cuda
