// From codes to upper bounds and estimates of scores (screen.hpp has the inequality), for one instruction set. Included by tiles_impl.hpp,
// within its namespaces.

// The inequality of screen.hpp, for a number or a vector of queries.
template <typename Number>
inline Number bound_of(Number dot, Number scale, Number norm, Number error, const CodedRows& rows, int64_t r) {
    return dot * scale * rows.scales[r] + norm * rows.errors[r] + error * rows.norms[r];
}

#if defined(__aarch64__)
#include "bounds_dotprod_impl.hpp"
#endif

#if defined(__AVX512VNNI__) || defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int kScreenedQueries = 0x7FFFFFFF;

// What a panel's queries bring to their bounds, in registers.
template <int VECTORS>
struct Lanes {
    Vector scales[VECTORS], norms[VECTORS], errors[VECTORS];

    explicit Lanes(const CodedQueries& queries) {
        for (int v = 0; v < VECTORS; ++v) {
            scales[v] = load(queries.scales + v * kVector);
            norms[v] = load(queries.norms + v * kVector);
            errors[v] = load(queries.errors + v * kVector);
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
    Vector thresholds[VECTORS];

    Finder(const CodedRows& r, const CodedQueries& queries, const float* lowest, Bounded* to) : rows(r), lanes(queries), reached(to) {
        for (int v = 0; v < VECTORS; ++v) thresholds[v] = load(lowest + v * kVector);
    }

    template <int ROWS>
    void operator()(int64_t first, const Vector (&dots)[ROWS][VECTORS]) {
        Vector bounds[ROWS][VECTORS];
        uint32_t any = 0;
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                bounds[r][v] = bound_of(dots[r][v], lanes.scales[v], lanes.norms[v], lanes.errors[v], rows, first + r);
                any |= not_below(bounds[r][v], thresholds[v]);
            }
        if (__builtin_expect(any == 0, 1)) return;
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) note((first + r) * kLanes + v * kVector, bounds[r][v], thresholds[v]);
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

// Stores the middle of what the codes leave open; 0 for a vector without a bound, whose codes are zero.
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

#if defined(__AVX512VNNI__)
constexpr bool kShortSums = false;

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
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool kShortSums = false;
#else
constexpr bool kShortSums = true;

#include "bounds_avx2_impl.hpp"
#endif

template <int VECTORS>
int64_t find_in_panel(const CodedRows& rows, const CodedQueries& queries, const float* thresholds, Bounded* reached) {
    Finder<VECTORS> finder(rows, queries, thresholds, reached);
    visit_panel<VECTORS>(rows, queries, finder);
    return finder.found;
}

int64_t find_bounded(const CodedRows& rows, const CodedQueries& queries, int lanes, const float* thresholds, Bounded* reached) {
    return lanes == kVector ? find_in_panel<1>(rows, queries, thresholds, reached) : find_in_panel<2>(rows, queries, thresholds, reached);
}

template <int VECTORS>
void estimate_in_panel(const CodedRows& rows, const CodedQueries& queries, float* scores) {
    Estimator<VECTORS> estimator{rows, Lanes<VECTORS>(queries), scores};
    visit_panel<VECTORS>(rows, queries, estimator);
}

void estimate_panel(const CodedRows& rows, const CodedQueries& queries, int lanes, float* scores) {
    if (lanes == kVector)
        estimate_in_panel<1>(rows, queries, scores);
    else
        estimate_in_panel<2>(rows, queries, scores);
}
#else
// Products of bytes are no faster here than of floats: what is gained is memory traffic, of one query.
constexpr int kScreenedQueries = 1;
constexpr bool kShortSums = false;

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
#elif defined(__aarch64__)
    int32x4_t sums[4] = {};
    for (int64_t d = 0; d < width; d += 64)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sums[v] = add_products(sums[v], signed_codes(codes + d + 16 * v), vld1q_s8(query + d + 16 * v));
    return vaddvq_s32(vaddq_s32(vaddq_s32(sums[0], sums[1]), vaddq_s32(sums[2], sums[3])));
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
    const uint8_t* row = rows.codes + first * rows.width;
    const int8_t* query = queries.codes + q * rows.width;
    // One row after the other, as in dot_each_row: side by side they would be sixteen streams, at half the rate where rows are long.
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r, row += rows.width) {
        sums[r] = _mm512_setzero_si512();
        for (int64_t d = 0; d < rows.width; d += 64) add_products(sums[r], _mm512_loadu_si512(row + d), _mm512_loadu_si512(query + d));
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
