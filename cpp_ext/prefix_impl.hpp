// Bounds from prefixes, sixteen rows at a time (prefix.hpp has the inequality and the layout), for one instruction set. Included by
// tiles_impl.hpp, within its namespaces.

constexpr int kBlockVectors = kPrefixRows / kVector;

inline Vector whole_numbers(const uint16_t* from) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
    return vcvtq_f32_u32(vmovl_u16(vld1_u16(from)));
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
#elif defined(__aarch64__)
    int32x4_t sums[kBlockVectors] = {};
    for (int64_t d = 0; d < width; d += 4, codes += 4 * kPrefixRows) {
        const int8x16_t other = four_codes(query.codes + d);
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVectors; ++v) sums[v] = add_products(sums[v], signed_codes(codes + 16 * v), other);
    }
    for (int v = 0; v < kBlockVectors; ++v) dots[v] = vcvtq_f32_s32(sums[v]);
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

// Calls visit(block, v, bounds) with the upper bounds of vector v of each block.
template <typename Visit>
inline void bound_blocks(const uint8_t* blocks, int64_t count, int64_t width, const PrefixQuery& query, const Visit& visit) {
    const int64_t bytes = kPrefixRows * width + static_cast<int64_t>(sizeof(PrefixHeader));
    for (int64_t block = 0; block < count; ++block, blocks += bytes) {
        PrefixHeader header;
        memcpy(&header, blocks, sizeof header);
        const float scale = query.scale * header.scale, rest = query.rest * header.rest_unit;
        const float rounding = query.norm * header.error + query.error * header.norm;
        Vector dots[kBlockVectors];
        prefix_dots(blocks + sizeof header, query, width, dots);
        for (int v = 0; v < kBlockVectors; ++v)
            visit(block, v, dots[v] * scale + whole_numbers(header.rests + v * kVector) * rest + rounding);
    }
}

int64_t find_prefixed(const uint8_t* blocks, int64_t count, int64_t width, const PrefixQuery& query, float threshold, uint32_t* positions) {
    const Vector thresholds = broadcast(threshold);
    int64_t found = 0;
    bound_blocks(blocks, count, width, query, [&](int64_t block, int v, const Vector& bounds) {
        for (uint32_t bits = not_below(bounds, thresholds); bits; bits &= bits - 1)
            positions[found++] = static_cast<uint32_t>(block * kPrefixRows + v * kVector + __builtin_ctz(bits));
    });
    return found;
}

void bound_prefixed(const uint8_t* blocks, int64_t count, int64_t width, const PrefixQuery& query, float* bounds) {
    bound_blocks(blocks, count, width, query,
                 [&](int64_t block, int v, const Vector& own) { store(bounds + block * kPrefixRows + v * kVector, own); });
}

void bound_blocks_of_codes(const CodedRows& rows, const CodedQueries& query, float* bounds) {
    const PrefixQuery own = {query.codes, query.offsets[0], 0.0f, 0.0f, 0.0f, 0.0f};
    const Vector scale = broadcast(query.scales[0]), norm = broadcast(query.norms[0]), error = broadcast(query.errors[0]);
    const uint8_t* codes = rows.codes;
    for (int64_t first = 0; first < rows.count; first += kPrefixRows, codes += kPrefixRows * rows.width) {
        Vector dots[kBlockVectors];
        prefix_dots(codes, own, rows.width, dots);
        for (int v = 0; v < kBlockVectors; ++v) {
            const int64_t at = first + v * kVector, part = rows.count - at;
            if (part >= kVector) {
                store(bounds + at,
                      dots[v] * scale * load(rows.scales + at) + norm * load(rows.errors + at) + error * load(rows.norms + at));
            } else if (part > 0) {
                const Vector last = dots[v] * scale * load_part(rows.scales + at, part) + norm * load_part(rows.errors + at, part) +
                                    error * load_part(rows.norms + at, part);
                memcpy(bounds + at, &last, static_cast<size_t>(part) * sizeof(float));
            }
        }
    }
}

// Rows to columns: each round puts the numbers of the first four vectors and of the others one beside the other.
inline void transpose(Floats (&numbers)[8]) {
    for (int round = 0; round < 3; ++round) {
        Floats next[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = __builtin_shufflevector(numbers[i], numbers[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            next[2 * i + 1] = __builtin_shufflevector(numbers[i], numbers[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        memcpy(numbers, next, sizeof next);
    }
}

void encode_prefix(const float* rows, int64_t width, uint8_t* codes, PrefixSums* sums) {
    constexpr int kHalves = kPrefixRows / 8;
    Floats largest = {};
    for (int64_t at = 0; at < width * kPrefixRows; at += 8) {
        Floats value;
        memcpy(&value, rows + at, sizeof value);
        const Floats magnitude = reinterpret_cast<Floats>(reinterpret_cast<Codes>(value) & 0x7FFFFFFF);
        raise(largest, magnitude);
    }
    const float scale = greatest_of(largest) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int half = 0; half < kHalves; ++half) {
        Doubles whole = {}, coded = {}, left = {};
        for (int64_t p = 0; p < width; p += 8) {
            Floats columns[8];
            for (int r = 0; r < 8; ++r) memcpy(&columns[r], rows + (half * 8 + r) * width + p, sizeof columns[r]);
            transpose(columns);
            Codes fours[2] = {};
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const Floats value = columns[i];
                Floats scaled = value * inverse;  // as in quantise
                lower(scaled, 127.0f - Floats{});
                raise(scaled, -127.0f - Floats{});
                const Floats rounded = (scaled + 0x1.8p23f) - 0x1.8p23f;
                fours[i / 4] |= (__builtin_convertvector(rounded, Codes) + 128) << (8 * (i % 4));
                Doubles wide, whole_codes;
                widen_to(wide, value);
                widen_to(whole_codes, rounded);
                const Doubles stored = whole_codes * double{scale}, rest = wide - stored;
                whole += wide * wide;
                coded += stored * stored;
                left += rest * rest;
            }
            for (int four = 0; four < 2; ++four)
                memcpy(codes + (p + 4 * four) * kPrefixRows + half * sizeof(Codes), &fours[four], sizeof(Codes));
        }
        memcpy(sums->whole + 8 * half, &whole, sizeof whole);
        memcpy(sums->coded + 8 * half, &coded, sizeof coded);
        memcpy(sums->left + 8 * half, &left, sizeof left);
    }
    sums->scale = scale;
}
