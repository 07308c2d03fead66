// Upper bounds of many scores where there is no 8-bit dot product: products of bytes are added up in 16 bits, four deep, before they are
// widened to 32. That takes five multiplications of 32 bytes each for what multiply-adds of floats take sixteen. Included by
// bounds_impl.hpp, within its namespaces.
//
// Nothing can overflow, for the queries' codes are chosen so (screen.hpp): the positive ones of those that one sum of 16 bits sees come to
// kMostSum at most, and so do the negative ones; times a row's unsigned code that is 128 * 255 = 32640. Every part of such a sum, the pairs
// that vpmaddubsw saturates among them, is then between -32640 and 32640.

constexpr int64_t kVisitedRows = 4, kStripRows = 32;

// sums[row][lane] = <codes, query> without the offset, of at most kStripRows rows; sums stay in the first-level cache, and the codes of a
// panel's queries in registers. `next` is what memory brings meanwhile, as many bytes as the strip has.
template <int VECTORS>
inline void multiply_strip(const uint8_t* codes, int64_t count, int64_t width, const int8_t* panel, const uint8_t* next, int32_t* sums) {
    constexpr int64_t kSteps = kSumCodes / 4, kLanes = VECTORS * kVector;
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t d = 0; d < width; d += kSumCodes, panel += kSumCodes * kLanes) {
        __m256i query[kSteps][VECTORS];
#pragma GCC unroll 4
        for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v)
                query[step][v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + step * 4 * kLanes + v * 32));
        const uint8_t* row = codes + d;
        for (int64_t r = 0; r < count; ++r, row += width) {
            if (r % 4 == 0) __builtin_prefetch(next, 0, 2), next += 64;
            __m256i products[VECTORS];
#pragma GCC unroll 4
            for (int step = 0; step < kSteps; ++step) {
                int32_t bytes;
                memcpy(&bytes, row + 4 * step, sizeof bytes);
                const __m256i four = _mm256_set1_epi32(bytes);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) {
                    const __m256i pairs = _mm256_maddubs_epi16(four, query[step][v]);
                    products[v] = step ? _mm256_add_epi16(products[v], pairs) : pairs;
                }
            }
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                auto* sum = reinterpret_cast<__m256i*>(sums + (r * VECTORS + v) * kVector);
                const __m256i wide = _mm256_madd_epi16(products[v], ones);
                _mm256_store_si256(sum, d ? _mm256_add_epi32(wide, _mm256_load_si256(sum)) : wide);
            }
        }
    }
}

// Calls visit(first, dots) with <codes, query> + offset of some rows and a panel.
template <int ROWS, int VECTORS, typename Visit>
inline void visit_strip_rows(const int32_t* sums, const Integers (&offsets)[VECTORS], int64_t first, Visit& visit) {
    Vector dots[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            Integers sum;
            memcpy(&sum, sums + (r * VECTORS + v) * kVector, sizeof sum);
            dots[r][v] = __builtin_convertvector(sum + offsets[v], Vector);
        }
    visit(first, dots);
}

template <int VECTORS, typename Visit>
void visit_panel(const CodedRows& rows, const CodedQueries& queries, Visit& visit) {
    constexpr int64_t kLanes = VECTORS * kVector;
    alignas(32) int32_t sums[kStripRows * kLanes];
    Integers offsets[VECTORS];
    for (int v = 0; v < VECTORS; ++v) memcpy(&offsets[v], queries.offsets + v * kVector, sizeof offsets[v]);
    for (int64_t first = 0; first < rows.count; first += kStripRows) {
        const int64_t count = rows.count - first < kStripRows ? rows.count - first : kStripRows;
        const uint8_t* codes = rows.codes + first * rows.width;
        multiply_strip<VECTORS>(codes, count, rows.width, queries.codes, codes + count * rows.width, sums);
        int64_t r = 0;
        for (; r + kVisitedRows <= count; r += kVisitedRows)
            visit_strip_rows<kVisitedRows, VECTORS>(sums + r * kLanes, offsets, first + r, visit);
        for (; r < count; ++r) visit_strip_rows<1, VECTORS>(sums + r * kLanes, offsets, first + r, visit);
    }
}
