// Bounds from prefixes, sixteen rows at a time (prefix.hpp has the inequality and the layout), for one instruction set. Included by
// tiles_impl.hpp, within its namespaces.

constexpr int kBlockVectors = kPrefixRows / kVector;

inline Vector whole_numbers(const uint16_t* from) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vector numbers;
    for (int lane = 0; lane < kVector; ++lane) numbers[lane] = from[lane];
    return numbers;
#endif
}

// <codes, query> + offset of each row of a block.
inline void prefix_dots(const uint8_t* codes, const PrefixQuery& query, int64_t width, Vector (&dots)[kBlockVectors]) {
#if defined(__AVX512VNNI__)
    __m512i even = _mm512_set1_epi32(query.offset), odd = _mm512_setzero_si512();  // two chains: one would wait for itself
    for (int64_t d = 0; d < width; d += 8, codes += 128) {
        int32_t four[2];
        memcpy(four, query.codes + d, sizeof four);
        add_products(even, _mm512_loadu_si512(codes), _mm512_set1_epi32(four[0]));
        add_products(odd, _mm512_loadu_si512(codes + 64), _mm512_set1_epi32(four[1]));
    }
    dots[0] = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
#elif defined(__AVX2__)
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    const __m256i middle = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi16(1);
    for (int64_t d = 0; d < width; d += 4, codes += 64) {
        int32_t four;
        memcpy(&four, query.codes + d, sizeof four);
        const __m256i other = _mm256_set1_epi32(four), magnitude = _mm256_abs_epi8(other);  // as in code_dot
        for (int v = 0; v < 2; ++v) {
            const __m256i code = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * v)), middle);
            const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(code, other));
            sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(pairs, ones));
        }
    }
    for (int v = 0; v < 2; ++v) dots[v] = _mm256_cvtepi32_ps(sums[v]);
#else
    int32_t sums[kPrefixRows];
    for (int r = 0; r < kPrefixRows; ++r) sums[r] = query.offset;
    for (int64_t d = 0; d < width; d += 4, codes += 4 * kPrefixRows)
        for (int r = 0; r < kPrefixRows; ++r)
            for (int i = 0; i < 4; ++i) sums[r] += int32_t{codes[4 * r + i]} * query.codes[d + i];
    for (int v = 0; v < kBlockVectors; ++v)
        for (int lane = 0; lane < kVector; ++lane) dots[v][lane] = static_cast<float>(sums[v * kVector + lane]);
#endif
}

int64_t find_prefixed(const uint8_t* blocks, int64_t count, int64_t width, const PrefixQuery& query, float threshold, uint32_t* positions) {
    const int64_t bytes = kPrefixRows * width + static_cast<int64_t>(sizeof(PrefixHeader));
    const Vector thresholds = broadcast(threshold);
    int64_t found = 0;
    for (int64_t block = 0; block < count; ++block, blocks += bytes) {
        PrefixHeader header;
        memcpy(&header, blocks, sizeof header);
        const float scale = query.scale * header.scale, rest = query.rest * header.rest_unit;
        const float rounding = query.norm * header.error + query.error * header.norm;
        Vector dots[kBlockVectors];
        prefix_dots(blocks + sizeof header, query, width, dots);
        for (int v = 0; v < kBlockVectors; ++v) {
            uint32_t bits = not_below(dots[v] * scale + whole_numbers(header.rests + v * kVector) * rest + rounding, thresholds);
            for (; bits; bits &= bits - 1)
                positions[found++] = static_cast<uint32_t>(block * kPrefixRows + v * kVector + __builtin_ctz(bits));
        }
    }
    return found;
}
