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
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += row[step] * query[step][v];
        row += width;
        asm("" : "+r"(row));  // one moving pointer: the compiler would keep one a row, and has no registers for them
    }
}

// Memory is asked for in its own order meanwhile, `lines` cache lines a step: rows are read side by side, which no hardware prefetcher
// follows.
template <int ROWS, int VECTORS>
inline void dot_group(const float* rows, int64_t width, const float* panel, const char* next, int64_t lines, float* scores) {
    constexpr int kSteps = kVector == 16 ? 4 / VECTORS : 2 / VECTORS;
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

// What a panel's queries bring to their bounds, in registers.
template <int VECTORS>
struct Lanes {
    Vector scales[VECTORS], norms[VECTORS], errors[VECTORS], thresholds[VECTORS];

    Lanes(const CodedQueries& queries, const float* lowest) {
        for (int v = 0; v < VECTORS; ++v) {
            scales[v] = load(queries.scales + v * kVector);
            norms[v] = load(queries.norms + v * kVector);
            errors[v] = load(queries.errors + v * kVector);
            thresholds[v] = load(lowest + v * kVector);
        }
    }
};

// Notes the pairs whose bound reaches the threshold. Rows are looked at some together, for most have none.
template <int VECTORS>
struct Finder {
    static constexpr int kLanes = VECTORS * kVector;

    const CodedRows& rows;
    const Lanes<VECTORS> lanes;
    Bounded* reached;
    int64_t found = 0;

    template <int ROWS>
    void operator()(int64_t first, const Vector (&dots)[ROWS][VECTORS]) {
        Vector bounds[ROWS][VECTORS];
        uint32_t any = 0;
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                bounds[r][v] = bound_of(dots[r][v], lanes.scales[v], lanes.norms[v], lanes.errors[v], rows, first + r);
                any |= not_below(bounds[r][v], lanes.thresholds[v]);
            }
        if (__builtin_expect(any == 0, 1)) return;
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) note((first + r) * kLanes + v * kVector, bounds[r][v], lanes.thresholds[v]);
    }

    // `position` is lane 0's.
    void note(int64_t position, Vector bound, Vector threshold) {
        float bounds[kVector];
        store(bounds, bound);
        for (uint32_t bits = not_below(bound, threshold); bits; bits &= bits - 1) {
            const int lane = __builtin_ctz(bits);
            reached[found++] = {static_cast<uint32_t>(position + lane), bounds[lane]};
        }
    }
};

// Stores the middle of what the codes leave open.
template <int VECTORS>
struct Estimator {
    const CodedRows& rows;
    const Lanes<VECTORS> lanes;
    float* scores;

    template <int ROWS>
    void operator()(int64_t first, const Vector (&dots)[ROWS][VECTORS]) {
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v)
                store(scores + ((first + r) * VECTORS + v) * kVector, dots[r][v] * lanes.scales[v] * rows.scales[first + r]);
    }
};

// _mm512_dpbusd_epi32 in place: GCC 12 copies the sums to other registers before each.
inline void add_products(__m512i& sums, __m512i codes, __m512i query) {
    asm("vpdpbusd\t{%2, %1, %0|%0, %1, %2}" : "+v"(sums) : "v"(codes), "v"(query));
}

// Calls visit(first, dots) with <codes, query> + offset of a group of rows and a panel.
template <int ROWS, int VECTORS, typename Visit>
inline void visit_group(const CodedRows& rows, int64_t first, const CodedQueries& queries, Visit& visit) {
    constexpr int kLanes = VECTORS * kVector;
    __m512i sums[ROWS][VECTORS];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_loadu_si512(queries.offsets + v * kVector);
    constexpr int kSteps = 4 / VECTORS, kCodeLine = 64;
    const uint8_t* codes = rows.codes + first * rows.width;
    for (int64_t line = 0; line < rows.width; line += kCodeLine) {
        const uint8_t* next = codes + ROWS * (rows.width + line);  // as in dot_group
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next + r * kCodeLine, 0, 2);
        for (int64_t d = line; d < line + kCodeLine; d += 4 * kSteps) {
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
                    for (int v = 0; v < VECTORS; ++v) add_products(sums[r][v], _mm512_set1_epi32(four), query[step][v]);
                }
                row += rows.width;
                asm("" : "+r"(row));
            }
        }
    }
    Vector dots[ROWS][VECTORS];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) dots[r][v] = __builtin_convertvector(reinterpret_cast<Integers>(sums[r][v]), Vector);
    visit(first, dots);
}

template <int VECTORS, typename Visit>
void visit_groups(const CodedRows& rows, int64_t r, const CodedQueries& queries, Visit& visit) {
    constexpr int kRows = VECTORS == 2 ? kWideRows : kNarrowRows;
    for (; r + kRows <= rows.count; r += kRows) visit_group<kRows, VECTORS>(rows, r, queries, visit);
    for (; r + 4 <= rows.count; r += 4) visit_group<4, VECTORS>(rows, r, queries, visit);
    for (; r < rows.count; ++r) visit_group<1, VECTORS>(rows, r, queries, visit);
}

#if defined(__AMX_INT8__)
#include "tiles_amx_impl.hpp"
#else
template <int VECTORS, typename Visit>
void visit_panel(const CodedRows& rows, const CodedQueries& queries, Visit& visit) {
    visit_groups<VECTORS>(rows, 0, queries, visit);
}
#endif

template <int VECTORS>
int64_t find_in_panel(const CodedRows& rows, const CodedQueries& queries, const float* thresholds, Bounded* reached) {
    Finder<VECTORS> finder{rows, Lanes<VECTORS>(queries, thresholds), reached};
    visit_panel<VECTORS>(rows, queries, finder);
    return finder.found;
}

int64_t find_bounded(const CodedRows& rows, const CodedQueries& queries, int lanes, const float* thresholds, Bounded* reached) {
    return lanes == kVector ? find_in_panel<1>(rows, queries, thresholds, reached) : find_in_panel<2>(rows, queries, thresholds, reached);
}

template <int VECTORS>
void estimate_in_panel(const CodedRows& rows, const CodedQueries& queries, float* scores) {
    Estimator<VECTORS> estimator{rows, Lanes<VECTORS>(queries, queries.scales), scores};
    visit_panel<VECTORS>(rows, queries, estimator);
}

void estimate_panel(const CodedRows& rows, const CodedQueries& queries, int lanes, float* scores) {
    if (lanes == kVector)
        estimate_in_panel<1>(rows, queries, scores);
    else
        estimate_in_panel<2>(rows, queries, scores);
}
#else
// Products of bytes are no faster here than of floats: what is gained is memory traffic, of a few queries.
constexpr int kScreenedQueries = kVector == 8 ? kRowQueries : 1;

constexpr int64_t (*find_bounded)(const CodedRows&, const CodedQueries&, int, const float*, Bounded*) = nullptr;
constexpr void (*estimate_panel)(const CodedRows&, const CodedQueries&, int, float*) = nullptr;
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

#if defined(__AVX512VNNI__)
// The sums of the lanes of each of 16 vectors, in order.
inline __m512i sum_each(const __m512i (&rows)[16]) {
    __m512i pairs[8], quads[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        pairs[i] =
            _mm512_add_epi32(_mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)  // within 128 bits: four rows, one number each
        quads[i] =
            _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]), _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        halves[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                     _mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0xDD));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88), _mm512_shuffle_i32x4(halves[0], halves[1], 0xDD));
}

// Bounds of 16 rows from `first` on: sixteen sums are added up across lanes together, for what one costs alone three times.
inline void bound_sixteen(const CodedRows& rows, int64_t first, const CodedQueries& queries, int q, float* bounds) {
    __m512i sums[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) sums[r] = _mm512_setzero_si512();
    const uint8_t* codes = rows.codes + first * rows.width;
    const int8_t* query = queries.codes + q * rows.width;
    for (int64_t d = 0; d < rows.width; d += 64) {
        const __m512i part = _mm512_loadu_si512(query + d);
        const uint8_t* row = codes + d;
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r, row += rows.width) add_products(sums[r], _mm512_loadu_si512(row), part);
    }
    const __m512i sum = _mm512_add_epi32(sum_each(sums), _mm512_set1_epi32(queries.offsets[q]));
    const Vector dot = _mm512_cvtepi32_ps(sum);
    store(bounds, dot * queries.scales[q] * load(rows.scales + first) + queries.norms[q] * load(rows.errors + first) +
                      queries.errors[q] * load(rows.norms + first));
}
#endif

void bound_rows(const CodedRows& rows, const CodedQueries& queries, int count, float* bounds, int64_t stride) {
    constexpr int64_t kBlock = 16;
    for (int64_t first = 0; first < rows.count; first += kBlock) {
        const int64_t block = rows.count - first < kBlock ? rows.count - first : kBlock;
        for (int q = 0; q < count; ++q) {
#if defined(__AVX512VNNI__)
            if (block == kBlock) {
                bound_sixteen(rows, first, queries, q, bounds + q * stride + first);
                continue;
            }
#endif
            int32_t sums[kBlock];
            for (int64_t r = 0; r < block; ++r)
                sums[r] = code_dot(rows.codes + (first + r) * rows.width, queries.codes + q * rows.width, queries.offsets[q], rows.width);
            for (int64_t r = 0; r < block; ++r)
                bounds[q * stride + first + r] =
                    bound_of(static_cast<float>(sums[r]), queries.scales[q], queries.norms[q], queries.errors[q], rows, first + r);
        }
    }
}

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Codes __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(8)));

// Calls step(value, d, size) with eight numbers at a time, whatever the registers hold; the last are filled up with zeros.
template <typename Step>
inline void in_eights(const float* vector, int64_t width, const Step& step) {
    Floats value;
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
        memcpy(&value, vector + d, sizeof value);
        step(value, d, sizeof(Bytes));
    }
    if (d == width) return;
    value = Floats{};
    memcpy(&value, vector + d, static_cast<size_t>(width - d) * sizeof(float));
    step(value, d, static_cast<size_t>(width - d));
}

inline double total(const Doubles& lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < 8; ++lane) sum += lanes[lane];
    return sum;
}

Quantised quantise(const float* vector, int64_t width, int8_t* codes) {
    Floats largest = {};
    Doubles squares = {};
    in_eights(vector, width, [&](const Floats& value, int64_t, size_t) {
        const Floats magnitude = value < 0.0f ? -value : value;
        const Doubles wide = __builtin_convertvector(value, Doubles);
        largest = magnitude > largest ? magnitude : largest;
        squares += wide * wide;
    });
    const double square = total(squares);
    if (!(square <= kLargestNorm * kLargestNorm)) {
        memset(codes, 0, static_cast<size_t>(width));
        const double nothing = __builtin_nan("");
        return {0.0f, nothing, nothing, nothing};
    }
    float most = 0.0f;
    for (int lane = 0; lane < 8; ++lane) most = largest[lane] > most ? largest[lane] : most;
    const float scale = most / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    Doubles coded_norms = {}, errors = {};
    in_eights(vector, width, [&](const Floats& value, int64_t d, size_t size) {
        // Any code is valid: the error norm is taken of what it really leaves. An infinite inverse times 0 is NaN: code 127.
        Floats scaled = value * inverse;
        scaled = scaled < 127.0f ? scaled : 127.0f - Floats{};
        scaled = scaled > -127.0f ? scaled : -127.0f - Floats{};
        const Floats rounded = (scaled + 0x1.8p23f) - 0x1.8p23f;  // to the nearest integer: there is no room for more digits
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, Codes), Bytes);
        memcpy(codes + d, &bytes, size);
        const Doubles coded = __builtin_convertvector(rounded, Doubles) * double{scale};
        const Doubles left = __builtin_convertvector(value, Doubles) - coded;
        coded_norms += coded * coded;
        errors += left * left;
    });
    return {scale, __builtin_sqrt(square), __builtin_sqrt(total(coded_norms)), __builtin_sqrt(total(errors))};
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
    .dot_panel = dot_panel,
    .dot_rows = dot_rows,
    .find_bounded = find_bounded,
    .estimate_panel = estimate_panel,
    .bound_rows = bound_rows,
    .max_over_tokens = max_over_tokens,
    .find = find,
    .widen = widen,
    .quantise = quantise,
    .uniforms = uniforms,
    .multiply_add_loop = multiply_add_loop,
};

}  // namespace dqe::cpu
