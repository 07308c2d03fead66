// The tile kernels in compiler vectors, for one instruction set. Include once per translation unit, with DQE_ISA set to a
// name; compiled with that set's -m flags and with contraction on.
//
// Nothing here may be shared with code compiled for another set: all is in an unnamed namespace and no inline function or
// template of the standard library is used, or the linker could keep the copy that an older processor cannot run.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tiles.hpp"

namespace dqe::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVector = 16, kWideRows = 12, kNarrowRows = 12;
#elif defined(__AVX2__)
constexpr int kVector = 8, kWideRows = 6, kNarrowRows = 12;
#elif defined(__aarch64__)
constexpr int kVector = 4, kWideRows = 12, kNarrowRows = 24;
#else
constexpr int kVector = 4, kWideRows = 6, kNarrowRows = 12;
#endif
constexpr int kRowQueries = 4;

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef int32_t Integers __attribute__((vector_size(4 * kVector)));

inline Vector load(const float* from) {
    Vector value;
    memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vector value) { memcpy(to, &value, sizeof value); }

inline Vector broadcast(float value) { return value - Vector{}; }

// One bit per lane, set where `lanes` is -1.
inline uint32_t bits_of(Integers lanes) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kVector; ++lane) bits |= static_cast<uint32_t>(lanes[lane] & 1) << lane;
    return bits;
#endif
}

// ---------------------------------------------------------------- scores

// Steps along D taken together: the address of a row is then found once for so many multiply-adds. More do not fit registers.
template <int ROWS, int VECTORS, int STEPS>
inline void dot_steps(const float* row, int64_t width, const float* panel, Vector (&sums)[ROWS][VECTORS]) {
    Vector query[STEPS][VECTORS];
#pragma GCC unroll 4
    for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) query[step][v] = load(panel + (step * VECTORS + v) * kVector);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += row[step] * query[step][v];
        row += width;
        asm("" : "+r"(row));  // one moving pointer: the compiler would keep one a row, and has no registers for them
    }
}

template <int ROWS, int VECTORS>
inline void dot_group(const float* rows, int64_t width, const float* panel, float* scores) {
    constexpr int kSteps = kVector == 16 ? 4 / VECTORS : 2 / VECTORS, kLine = 16;
    Vector sums[ROWS][VECTORS] = {};
    int64_t d = 0;
    for (; d + kLine <= width; d += kLine) {
        // The next group's cache lines in the order of memory; rows are read side by side, which no hardware prefetcher follows.
        const float* next = rows + ROWS * (width + d);
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next + r * kLine, 0, 2);
        for (int64_t step = d; step < d + kLine; step += kSteps)
            dot_steps<ROWS, VECTORS, kSteps>(rows + step, width, panel + step * VECTORS * kVector, sums);
    }
    for (; d < width; ++d) dot_steps<ROWS, VECTORS, 1>(rows + d, width, panel + d * VECTORS * kVector, sums);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(scores + (r * VECTORS + v) * kVector, sums[r][v]);
}

template <int ROWS, int VECTORS>
void dot_groups(const Rows& rows, const float* panel, float* scores) {
    constexpr int kLanes = VECTORS * kVector;
    int64_t r = 0;
    for (; r + ROWS <= rows.count; r += ROWS) dot_group<ROWS, VECTORS>(rows.data + r * rows.width, rows.width, panel, scores + r * kLanes);
    constexpr int kSmall = ROWS % 4 ? 3 : 4;
    for (; r + kSmall <= rows.count; r += kSmall)
        dot_group<kSmall, VECTORS>(rows.data + r * rows.width, rows.width, panel, scores + r * kLanes);
    for (; r < rows.count; ++r) dot_group<1, VECTORS>(rows.data + r * rows.width, rows.width, panel, scores + r * kLanes);
}

void dot_panel(const Rows& rows, const float* panel, int lanes, float* scores) {
    if (lanes == kVector)
        dot_groups<kNarrowRows, 1>(rows, panel, scores);
    else
        dot_groups<kWideRows, 2>(rows, panel, scores);
}

// Pairwise, so the order is fixed.
inline float sum_lanes(Vector value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(value);
#elif defined(__AVX2__)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
#else
    float lanes[kVector];
    store(lanes, value);
    for (int half = kVector / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
#endif
}

inline Vector load_part(const float* from, int64_t size) {
    Vector value = {};
    memcpy(&value, from, static_cast<size_t>(size) * sizeof(float));
    return value;
}

// One row after the other: several side by side would be so many streams, and memory delivers one at twice the rate. Rows
// overlap all the same, out of order.
template <int QUERIES>
void dot_each_row(const Rows& rows, const float* queries, float* scores, int64_t stride) {
    constexpr int kChains = kVector == 16 ? 4 : 2;  // of additions, side by side: one would wait for itself
    constexpr int64_t kStep = kChains * kVector;
    const int64_t width = rows.width;
    for (int64_t r = 0; r < rows.count; ++r) {
        const float* row = rows.data + r * width;
        Vector sums[QUERIES][kChains] = {};
        int64_t d = 0;
        for (; d + kStep <= width; d += kStep)
#pragma GCC unroll 4
            for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
                for (int q = 0; q < QUERIES; ++q) sums[q][c] += load(row + d + c * kVector) * load(queries + q * width + d + c * kVector);
        for (; d < width; d += kVector) {
            const int64_t part = width - d < kVector ? width - d : kVector;
#pragma GCC unroll 4
            for (int q = 0; q < QUERIES; ++q) sums[q][0] += load_part(row + d, part) * load_part(queries + q * width + d, part);
        }
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q) {
            Vector sum = sums[q][0] + sums[q][1];
            if constexpr (kChains == 4) sum += sums[q][2] + sums[q][3];
            scores[q * stride + r] = sum_lanes(sum);
        }
    }
}

void dot_rows(const Rows& rows, const float* queries, int count, float* scores, int64_t stride) {
    switch (count) {
        case 1:
            return dot_each_row<1>(rows, queries, scores, stride);
        case 2:
            return dot_each_row<2>(rows, queries, scores, stride);
        case 3:
            return dot_each_row<3>(rows, queries, scores, stride);
        default:
            return dot_each_row<4>(rows, queries, scores, stride);
    }
}

// ---------------------------------------------------------------- upper bounds from codes (screen.hpp has the inequality)

// The inequality of screen.hpp, for a number or a vector of queries.
template <typename Number>
inline Number bound_of(Number dot, Number scale, Number norm, Number error, const CodedRows& rows, int64_t r) {
    return dot * scale * rows.scales[r] + norm * rows.errors[r] + error * rows.norms[r];
}

#if defined(__AVX512VNNI__)
constexpr int kScreenedQueries = 0x7FFFFFFF;

template <int ROWS, int VECTORS>
inline void bound_group(const CodedRows& rows, int64_t first, const CodedQueries& queries, float* bounds) {
    constexpr int kLanes = VECTORS * kVector;
    __m512i sums[ROWS][VECTORS];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_loadu_si512(queries.offsets + v * kVector);
    constexpr int kSteps = 4 / VECTORS, kLine = 64;
    const uint8_t* codes = rows.codes + first * rows.width;
    for (int64_t line = 0; line < rows.width; line += kLine) {
        const uint8_t* next = codes + ROWS * (rows.width + line);  // as in dot_group
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next + r * kLine, 0, 2);
        for (int64_t d = line; d < line + kLine; d += 4 * kSteps) {
            __m512i query[kSteps][VECTORS];
#pragma GCC unroll 4
            for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) query[step][v] = _mm512_loadu_si512(queries.codes + (d + 4 * step) * kLanes + v * 64);
            const uint8_t* row = codes + d;
#pragma GCC unroll 32
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
                for (int step = 0; step < kSteps; ++step) {
                    int32_t four;
                    memcpy(&four, row + 4 * step, 4);
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], _mm512_set1_epi32(four), query[step][v]);
                }
                row += rows.width;
                asm("" : "+r"(row));
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            const int at = v * kVector;
            const Vector dot = __builtin_convertvector(reinterpret_cast<Integers>(sums[r][v]), Vector);
            store(bounds + r * kLanes + at,
                  bound_of(dot, load(queries.scales + at), load(queries.norms + at), load(queries.errors + at), rows, first + r));
        }
}

template <int ROWS, int VECTORS>
void bound_groups(const CodedRows& rows, const CodedQueries& queries, float* bounds) {
    constexpr int kLanes = VECTORS * kVector;
    int64_t r = 0;
    for (; r + ROWS <= rows.count; r += ROWS) bound_group<ROWS, VECTORS>(rows, r, queries, bounds + r * kLanes);
    for (; r + 4 <= rows.count; r += 4) bound_group<4, VECTORS>(rows, r, queries, bounds + r * kLanes);
    for (; r < rows.count; ++r) bound_group<1, VECTORS>(rows, r, queries, bounds + r * kLanes);
}

void bound_panel(const CodedRows& rows, const CodedQueries& queries, int lanes, float* bounds) {
    if (lanes == kVector)
        bound_groups<kNarrowRows, 1>(rows, queries, bounds);
    else
        bound_groups<kWideRows, 2>(rows, queries, bounds);
}
#else
// Products of bytes are no faster here than of floats: what is gained is memory traffic, of a few queries.
constexpr int kScreenedQueries = kVector == 8 ? kRowQueries : 1;

constexpr void (*bound_panel)(const CodedRows&, const CodedQueries&, int, float*) = nullptr;
#endif

// <codes, query> + offset; width is a multiple of 64.
inline int32_t code_dot(const uint8_t* codes, const int8_t* query, [[maybe_unused]] int32_t offset, int64_t width) {
#if defined(__AVX512VNNI__)
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < width; d += 64) sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(codes + d), _mm512_loadu_si512(query + d));
    return offset + _mm512_reduce_add_epi32(sum);
#elif defined(__AVX2__)
    // maddubs adds pairs in 16 bits: |query| <= 127 times a code in -127..127 cannot saturate them; an unsigned code could.
    __m256i sum = _mm256_setzero_si256();
    const __m256i middle = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi16(1);
    for (int64_t d = 0; d < width; d += 32) {
        const __m256i code = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + d)), middle);
        const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + d));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(other), _mm256_sign_epi8(code, other));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    __m128i part = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    part = _mm_add_epi32(part, _mm_shuffle_epi32(part, 0x4E));
    part = _mm_add_epi32(part, _mm_shuffle_epi32(part, 0xB1));
    return _mm_cvtsi128_si32(part);
#else
    int32_t sum = offset;
    for (int64_t d = 0; d < width; ++d) sum += int32_t{codes[d]} * query[d];
    return sum;
#endif
}

void bound_rows(const CodedRows& rows, const CodedQueries& queries, int count, float* bounds, int64_t stride) {
    constexpr int64_t kBlock = 16;
    for (int64_t first = 0; first < rows.count; first += kBlock) {
        const int64_t block = rows.count - first < kBlock ? rows.count - first : kBlock;
        for (int q = 0; q < count; ++q) {
            int32_t sums[kBlock];
            for (int64_t r = 0; r < block; ++r)
                sums[r] = code_dot(rows.codes + (first + r) * rows.width, queries.codes + q * rows.width, queries.offsets[q], rows.width);
            for (int64_t r = 0; r < block; ++r)
                bounds[q * stride + first + r] =
                    bound_of(static_cast<float>(sums[r]), queries.scales[q], queries.norms[q], queries.errors[q], rows, first + r);
        }
    }
}

// ---------------------------------------------------------------- selection

void max_over_tokens(const float* scores, int64_t items, int64_t tokens, int lanes, float* best) {
    for (int64_t i = 0; i < items; ++i)
        for (int at = 0; at < lanes; at += kVector) {
            Vector own = load(scores + i * tokens * lanes + at);
            for (int64_t m = 1; m < tokens; ++m) {
                const Vector next = load(scores + (i * tokens + m) * lanes + at);
                own = (own != own) | (next <= own) ? own : next;  // a NaN on either side stays
            }
            store(best + i * lanes + at, own);
        }
}

int64_t find(const float* scores, int64_t size, int lanes, const float* thresholds, uint32_t* positions) {
    int64_t found = 0;
    const auto note = [&](uint32_t bits, int64_t at) {
        for (; bits; bits &= bits - 1) positions[found++] = static_cast<uint32_t>(at + __builtin_ctz(bits));
    };
    if (lanes == kVector) {
        const Vector threshold = load(thresholds);
        for (int64_t at = 0; at < size; at += kVector) note(bits_of(~(load(scores + at) < threshold)), at);
        return found;
    }
    const Vector low = load(thresholds), high = load(thresholds + kVector);
    for (int64_t at = 0; at < size; at += 2 * kVector) {
        const Integers first = ~(load(scores + at) < low), second = ~(load(scores + at + kVector) < high);
        if (const uint32_t bits = bits_of(first)) note(bits, at);
        if (const uint32_t bits = bits_of(second)) note(bits, at + kVector);
    }
    return found;
}

// The definition of IEEE 754 binary16 in integer and exact float operations, for compilers to vectorise.
inline float widen_one(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFFu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t bits = magnitude << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;  // the exponents' biases differ by 112; subnormals come out right too
    memcpy(&bits, &value, sizeof bits);
    bits |= magnitude >= 0x7C00u ? 0x7F800000u : 0u;
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void widen(const uint16_t* half, int64_t size, float* single) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= size; i += 16)
        _mm512_storeu_ps(single + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i))));
#elif defined(__F16C__)
    for (; i + 8 <= size; i += 8)
        _mm256_storeu_ps(single + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
#endif
    for (; i < size; ++i) single[i] = widen_one(half[i]);
}

int64_t multiply_add_loop(int64_t steps, float* sink) {
    constexpr int kChains = 12;  // more than latency times throughput anywhere, and few enough for 16 registers
    Vector sums[kChains];
    for (int c = 0; c < kChains; ++c) sums[c] = broadcast(static_cast<float>(c));  // or the compiler would compute one for all
    const Vector factor = broadcast(sink[0]), other = broadcast(sink[1]);
    for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + other;
    for (int c = 0; c < kChains; ++c) sink[0] += sum_lanes(sums[c]);
    return steps * kChains * kVector;
}

}  // namespace

extern const TileKernels DQE_ISA;
const TileKernels DQE_ISA = {
    DQE_ISA_NAME, 2 * kVector,     kVector, kRowQueries, kScreenedQueries,  dot_panel, dot_rows, bound_panel,
    bound_rows,   max_over_tokens, find,    widen,       multiply_add_loop,
};

}  // namespace dqe::cpu
