// Which of many centres is nearest to a point, for one instruction set. Included by tiles_impl.hpp, within its namespaces.

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kNearestRows = 6;
#else
constexpr int kNearestRows = 2;  // of sixteen registers
#endif

// The first lane-wise maximum: `at` counts vectors, and lane l of vector a is the centre a * kVector + l.
inline uint32_t first_greatest(Integers best, Integers at) {
    int32_t scores[kVector], vectors[kVector];
    memcpy(scores, &best, sizeof scores);
    memcpy(vectors, &at, sizeof vectors);
#if defined(__AVX512F__)
    const int32_t most = _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(best));
#else
    int32_t most = scores[0];
    for (int lane = 1; lane < kVector; ++lane) most = scores[lane] > most ? scores[lane] : most;
#endif
    uint32_t first = 0xFFFFFFFF;
    for (uint32_t bits = bits_of(best == most); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        const uint32_t centre = static_cast<uint32_t>(vectors[lane] * kVector + lane);
        first = centre < first ? centre : first;
    }
    return first;
}

// sums[lane] += the products of a point's next four codes with those of centre `lane`.
inline void add_point_products(Integers& sums, const uint8_t* point, const int8_t* centres) {
    int32_t four;
    memcpy(&four, point, sizeof four);
#if defined(__AVX512VNNI__)
    __m512i all = reinterpret_cast<__m512i>(sums);
    add_products(all, _mm512_set1_epi32(four), _mm512_loadu_si512(centres));
    sums = reinterpret_cast<Integers>(all);
#elif defined(__AVX2__)
    // Codes of points are below 128: two products fit 16 bits.
    const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(centres));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), own);
    sums += reinterpret_cast<Integers>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__aarch64__)
    sums = reinterpret_cast<Integers>(add_products(reinterpret_cast<int32x4_t>(sums), four_codes(point), vld1q_s8(centres)));
#else
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < kVector; ++lane) sums[lane] += int32_t{point[i]} * centres[4 * lane + i];
#endif
}

template <int ROWS>
inline void nearest_group(const uint8_t* points, int64_t width, const CodedCentres& centres, uint32_t* nearest) {
    Integers best[ROWS], at[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        best[r] = INT32_MIN - Integers{};
        at[r] = Integers{};
    }
    const int8_t* codes = centres.codes;
    for (int64_t panel = 0; panel < centres.panels; ++panel) {
        Integers sums[ROWS][2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            Integers offsets;
            memcpy(&offsets, centres.offsets + (2 * panel + v) * kVector, sizeof offsets);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sums[r][v] = offsets;
        }
        for (int64_t d = 0; d < width; d += 4, codes += 8 * kVector)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) add_point_products(sums[r][v], points + r * width + d, codes + 4 * v * kVector);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const Integers better = sums[r][v] > best[r];
                best[r] = better ? sums[r][v] : best[r];
                at[r] = better ? static_cast<int32_t>(2 * panel + v) - Integers{} : at[r];
            }
    }
    for (int r = 0; r < ROWS; ++r) nearest[r] = first_greatest(best[r], at[r]);
}

void nearest(const uint8_t* points, int64_t count, int64_t width, const CodedCentres& centres, uint32_t* nearest) {
    int64_t r = 0;
    for (; r + kNearestRows <= count; r += kNearestRows) nearest_group<kNearestRows>(points + r * width, width, centres, nearest + r);
    if (r < count && count > kNearestRows) r = count - kNearestRows;  // some once more: one at a time would take longer
    for (; r + kNearestRows <= count; r += kNearestRows) nearest_group<kNearestRows>(points + r * width, width, centres, nearest + r);
    for (; r < count; ++r) nearest_group<1>(points + r * width, width, centres, nearest + r);
}

void code_points(const float* numbers, int64_t count, int64_t stride, int64_t width, const float* factors, uint8_t* codes, int64_t size) {
    for (int64_t i = 0; i < count; ++i, numbers += stride, codes += size)
        in_eights(numbers, width, [&](const Floats& value, int64_t d, size_t some) {
            Floats scaled = value * factors[i];
            lower(scaled, kPointCode - Floats{});
            raise(scaled, -kPointCode - Floats{});
            const uint64_t bytes = last_bytes(reinterpret_cast<Codes>(scaled + (0x1.8p23f + kPointCode + 1.0f)));
            memcpy(codes + d, &bytes, some);
        });
}

void squares(const Rows& rows, float* squares) {
    const float* row = rows.data;
    for (int64_t r = 0; r < rows.count; ++r, row += rows.width) {
        Vector sums = {};
        int64_t d = 0;
        for (; d + kVector <= rows.width; d += kVector) {
            const Vector value = load(row + d);
            sums += value * value;
        }
        if (d < rows.width) {
            const Vector value = load_part(row + d, rows.width - d);
            sums += value * value;
        }
        squares[r] = sum_lanes(sums);
    }
}
