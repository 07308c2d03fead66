// Vectors to codes, eight numbers at a time whatever the registers hold, for one instruction set. Included by tiles_impl.hpp, within its
// namespaces.

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Codes __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(8)));

// value > least ? value : least, and value < most ? value : most; the compiler would compare, and then choose.
inline void raise(Floats& value, const Floats& least) {
#if defined(__AVX2__)
    value = _mm256_max_ps(value, least);
#else
    value = value > least ? value : least;
#endif
}

inline void lower(Floats& value, const Floats& most) {
#if defined(__AVX2__)
    value = _mm256_min_ps(value, most);
#else
    value = value < most ? value : most;
#endif
}

inline float greatest_of(const Floats& lanes) {
#if defined(__AVX2__)
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
#else
    float most = lanes[0];
    for (int lane = 1; lane < 8; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
    return most;
#endif
}

// The last byte of each; a conversion of vectors comes out as eight of numbers.
inline uint64_t last_bytes(const Codes& numbers) {
#if defined(__AVX512VL__)
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm256_cvtepi32_epi8(reinterpret_cast<__m256i>(numbers))));
#elif defined(__AVX2__)
    const __m256i first = _mm256_set_epi64x(-1, 0x0C080400FFFFFFFF, -1, 0xFFFFFFFF0C080400);
    const __m256i fours = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(numbers), first);
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1))));
#else
    const Bytes bytes = __builtin_convertvector(numbers, Bytes);
    uint64_t all;
    memcpy(&all, &bytes, sizeof all);
    return all;
#endif
}

inline void widen_to(Doubles& wide, const Floats& value) {
#if defined(__AVX512F__)
    wide = reinterpret_cast<Doubles>(_mm512_cvtps_pd(value));  // the compiler would convert halves
#else
    wide = __builtin_convertvector(value, Doubles);
#endif
}

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
    typedef double Half __attribute__((vector_size(32)));
    Half halves[2];
    memcpy(halves, &lanes, sizeof lanes);
    const Half sum = halves[0] + halves[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

inline float sum_of(const Floats& lanes) {
    typedef float Half __attribute__((vector_size(16)));
    Half halves[2];
    memcpy(halves, &lanes, sizeof lanes);
    const Half sum = halves[0] + halves[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

Quantised quantise(const float* vector, int64_t width, float most_code, int8_t* codes) {
    Floats largest = {};
    Doubles squares = {};
    in_eights(vector, width, [&](const Floats& value, int64_t, size_t) {
        const Floats magnitude = reinterpret_cast<Floats>(reinterpret_cast<Codes>(value) & 0x7FFFFFFF);
        Doubles wide;
        widen_to(wide, value);
        raise(largest, magnitude);
        squares += wide * wide;
    });
    const double square = total(squares);
    if (!(square <= kLargestNorm * kLargestNorm)) {
        memset(codes, 0, static_cast<size_t>(width));
        const double nothing = __builtin_nan("");
        return {0.0f, nothing, nothing, nothing};
    }
    const float scale = greatest_of(largest) / most_code, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    Floats coded_squares = {}, left_squares = {};
    in_eights(vector, width, [&](const Floats& value, int64_t d, size_t size) {
        // Any code is valid: the error norm is taken of what it really leaves. An infinite inverse times 0 is NaN: code 127.
        Floats scaled = value * inverse;
        lower(scaled, 127.0f - Floats{});
        raise(scaled, -127.0f - Floats{});
        const Floats shifted = scaled + 0x1.8p23f;  // to the nearest integer, there is no room for more digits; its last byte is the code
        const uint64_t bytes = last_bytes(reinterpret_cast<Codes>(shifted));
        memcpy(codes + d, &bytes, size);
        const Floats rounded = shifted - 0x1.8p23f, left = value - rounded * scale;
        coded_squares += rounded * rounded;
        left_squares += left * left;
    });
    // Eight sums of float32 each, of numbers that are not negative: off by `room` of themselves at most. What is left is off by 2^-24 of
    // itself and of what the code stands for, each, and by what underflows, which
    // is far below kLeastNorm.
    const double room = 1.0 + static_cast<double>(width / 8 + 16) * 0x1p-24;
    const double coded = __builtin_sqrt(room * double{sum_of(coded_squares)}) * double{scale};
    const double left = __builtin_sqrt(room * double{sum_of(left_squares)}) + 0x1p-23 * coded;
    return {scale, __builtin_sqrt(square), coded, left};
}

Products products(const float* vector, const float* other, int64_t width) {
    Doubles with_other = {}, with_itself = {};
    in_eights(vector, width, [&](const Floats& value, int64_t d, size_t size) {
        Floats factor = {};
        memcpy(&factor, other + d, size * sizeof(float));
        Doubles wide, wide_factor;
        widen_to(wide, value);
        widen_to(wide_factor, factor);
        with_other += wide * wide_factor;
        with_itself += wide * wide;
    });
    return {total(with_other), total(with_itself)};
}
