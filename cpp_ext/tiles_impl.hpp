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
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "tiles.hpp"

namespace dqe::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVector = 16, kWideRows = 12, kNarrowRows = 12;
#elif defined(__AVX2__)
constexpr int kVector = 8, kWideRows = 6, kNarrowRows = 12;
#elif defined(__aarch64__)
constexpr int kVector = 4, kWideRows = 8, kNarrowRows = 16;
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

// a * b + c, rounded once where the set can. Left to contraction, GCC 13 and newer round some twice (tuning `avoid_fma_chains`), and a
// score would depend on how many rows were taken beside its own.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// One bit per lane, set where `lanes` is -1.
inline uint32_t bits_of(Integers lanes) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
#elif defined(__aarch64__)
    const Integers bits = {1, 2, 4, 8};
    return vaddvq_u32(reinterpret_cast<uint32x4_t>(lanes & bits));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kVector; ++lane) bits |= static_cast<uint32_t>(lanes[lane] & 1) << lane;
    return bits;
#endif
}

// One bit per lane, set where `value` is not below `other`, or either is NaN.
inline uint32_t not_below(Vector value, Vector other) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(value, other, _CMP_NLT_UQ);  // as a vector it would go from mask to lanes to mask
#else
    return bits_of(~(value < other));
#endif
}

// ---------------------------------------------------------------- scores

constexpr int kLine = 16;  // numbers

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
#if defined(__aarch64__)
        if constexpr (STEPS == 4) {                  // one load for four steps: multiply-adds take their factor from a lane
            const float32x4_t own = vld1q_f32(row);  // GCC 12 takes load() apart
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                sums[r][v] = vfmaq_laneq_f32(sums[r][v], query[0][v], own, 0);
                sums[r][v] = vfmaq_laneq_f32(sums[r][v], query[1][v], own, 1);
                sums[r][v] = vfmaq_laneq_f32(sums[r][v], query[2][v], own, 2);
                sums[r][v] = vfmaq_laneq_f32(sums[r][v], query[3][v], own, 3);
            }
        } else
#endif
#pragma GCC unroll 4
            for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) sums[r][v] = multiply_add(broadcast(row[step]), query[step][v], sums[r][v]);
        row += width;
        asm("" : "+r"(row));  // one moving pointer: the compiler would keep one a row, and has no registers for them
    }
}

// Memory is asked for in its own order meanwhile, `lines` cache lines a step: rows are read side by side, which no hardware prefetcher
// follows.
template <int ROWS, int VECTORS>
inline void dot_group(const float* rows, int64_t width, const float* panel, const char* next, int64_t lines, float* scores) {
#if defined(__aarch64__)
    constexpr int kSteps = 4;
#else
    constexpr int kSteps = kVector == 16 ? 4 / VECTORS : 2 / VECTORS;
#endif
    Vector sums[ROWS][VECTORS] = {};
    int64_t d = 0;
    for (; d + kLine <= width; d += kLine) {
        for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
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
void dot_groups(const Rows& rows, const float* panel, const Ahead& ahead, float* scores) {
    constexpr int kLanes = VECTORS * kVector, kSmall = ROWS % 4 ? 3 : 4;
    const int64_t steps = rows.width < kLine ? 1 : rows.width / kLine;
    int64_t r = 0;
    const auto group = [&]<int SIZE>() {
        const int64_t lines = (SIZE * ahead.row_bytes / 64 + steps * ahead.panels - 1) / (steps * ahead.panels);
        const char* next = ahead.from + r * ahead.row_bytes + ahead.panel * lines * steps * 64;
        dot_group<SIZE, VECTORS>(rows.data + r * rows.width, rows.width, panel, next, lines, scores + r * kLanes);
        r += SIZE;
    };
    while (r + ROWS <= rows.count) group.template operator()<ROWS>();
    while (r + kSmall <= rows.count) group.template operator()<kSmall>();
    while (r < rows.count) group.template operator()<1>();
}

void dot_panel(const Rows& rows, const float* panel, int lanes, const Ahead& ahead, float* scores) {
    if (lanes == kVector)
        dot_groups<kNarrowRows, 1>(rows, panel, ahead, scores);
    else
        dot_groups<kWideRows, 2>(rows, panel, ahead, scores);
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
                for (int q = 0; q < QUERIES; ++q)
                    sums[q][c] = multiply_add(load(row + d + c * kVector), load(queries + q * width + d + c * kVector), sums[q][c]);
        for (; d < width; d += kVector) {
            const int64_t part = width - d < kVector ? width - d : kVector;
#pragma GCC unroll 4
            for (int q = 0; q < QUERIES; ++q)
                sums[q][0] = multiply_add(load_part(row + d, part), load_part(queries + q * width + d, part), sums[q][0]);
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

#include "bounds_impl.hpp"
#include "eights_impl.hpp"
#include "lists_impl.hpp"
#include "nearest_impl.hpp"
#include "prefix_impl.hpp"

// ---------------------------------------------------------------- selection

void max_over_tokens(const float* scores, int64_t items, int64_t tokens, int lanes, float* best) {
    for (int64_t i = 0; i < items; ++i)
        for (int at = 0; at < lanes; at += kVector) {
            Vector own = load(scores + i * tokens * lanes + at);
            for (int64_t m = 1; m < tokens; ++m) {
                const Vector next = load(scores + (i * tokens + m) * lanes + at);
                own = ((own != own) | (next <= own)) ? own : next;  // a NaN on either side stays
            }
            store(best + i * lanes + at, own);
        }
}

int64_t find(const float* scores, int64_t size, int lanes, const float* thresholds, uint32_t* positions) {
    int64_t found = 0;
#if defined(__AVX512F__)
    // Without a branch, which would often be foreseen wrongly: a whole vector is stored, and its head counts.
    const auto note = [&](uint32_t bits, int64_t at) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i all = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(at)), lane);
        _mm512_storeu_si512(positions + found, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all));
        found += __builtin_popcount(bits);
    };
#else
    const auto note = [&](uint32_t bits, int64_t at) {
        for (; bits; bits &= bits - 1) positions[found++] = static_cast<uint32_t>(at + __builtin_ctz(bits));
    };
#endif
    if (lanes == kVector) {
        const Vector threshold = load(thresholds);
        for (int64_t at = 0; at < size; at += kVector) note(not_below(load(scores + at), threshold), at);
        return found;
    }
    const Vector low = load(thresholds), high = load(thresholds + kVector);
    for (int64_t at = 0; at < size; at += 2 * kVector) {
        const uint32_t first = not_below(load(scores + at), low), second = not_below(load(scores + at + kVector), high);
#if !defined(__AVX512F__)
        if (__builtin_expect((first | second) == 0, 1)) continue;
#endif
        note(first, at);
        note(second, at + kVector);
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

// Numbers of 32 bits in lanes of 64, so that a product fits.
constexpr int kWords = kVector / 2;
typedef uint64_t Words __attribute__((vector_size(8 * kWords)));

inline Words times(Words value, uint64_t factor) {
    const Words factors = factor - Words{};
#if defined(__AVX512F__)
    return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(value), reinterpret_cast<__m512i>(factors)));
#elif defined(__AVX2__)
    return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(value), reinterpret_cast<__m256i>(factors)));
#else
    return value * factors;
#endif
}

// philox.hpp's recipe side by side; written again because code shared with other instruction sets may not be called from here.
void uniforms(uint64_t seed, uint64_t query, const uint32_t* items, int count, double* u) {
    const Words low = 0xFFFFFFFF - Words{};
    for (int first = 0; first < count; first += kWords) {
        Words x0 = {}, x1 = {}, x2 = (query & 0xFFFFFFFF) - Words{}, x3 = (query >> 32) - Words{};
        const int some = count - first < kWords ? count - first : kWords;
        for (int i = 0; i < some; ++i) x0[i] = items[first + i];
        Words key0 = (seed & 0xFFFFFFFF) - Words{}, key1 = (seed >> 32) - Words{};
        for (int round = 0; round < 10; ++round) {
            const Words product0 = times(x0, 0xD2511F53), product1 = times(x2, 0xCD9E8D57);
            x0 = product1 >> 32 ^ x1 ^ key0;
            x1 = product1 & low;
            x2 = product0 >> 32 ^ x3 ^ key1;
            x3 = product0 & low;
            key0 = (key0 + 0x9E3779B9) & low;
            key1 = (key1 + 0xBB67AE85) & low;
        }
        const Words odd = (x1 << 32 | x0) >> 12 << 1 | 1;
        for (int i = 0; i < some; ++i) u[first + i] = static_cast<double>(odd[i]) * 0x1p-53;
    }
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
    .name = DQE_ISA_NAME,
    .wide = 2 * kVector,
    .narrow = kVector,
    .max_row_queries = kRowQueries,
    .screened_queries = kScreenedQueries,
    .short_sums = kShortSums,
    .dot_panel = dot_panel,
    .dot_rows = dot_rows,
    .find_bounded = find_bounded,
    .estimate_panel = estimate_panel,
    .bound_rows = bound_rows,
    .bound_blocks_of_codes = bound_blocks_of_codes,
    .max_over_tokens = max_over_tokens,
    .find = find,
    .widen = widen,
    .quantise = quantise,
    .products = products,
    .encode_prefix = encode_prefix,
    .find_prefixed = find_prefixed,
    .bound_prefixed = bound_prefixed,
    .find_lists = find_lists,
    .nearest = nearest,
    .code_points = code_points,
    .squares = squares,
    .uniforms = uniforms,
    .multiply_add_loop = multiply_add_loop,
};

}  // namespace dqe::cpu
