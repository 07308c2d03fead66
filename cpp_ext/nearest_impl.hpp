// Which of many centres is nearest to a point, for one instruction set. Included by tiles_impl.hpp, within its namespaces.

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kNearestRows = 6;
#else
constexpr int kNearestRows = 2;  // of sixteen registers
#endif

// The first lane-wise maximum: `at` counts vectors, and lane l of vector a is the centre a * kVector + l.
inline uint32_t first_greatest(Vector best, Integers at) {
    float scores[kVector];
    int32_t vectors[kVector];
    store(scores, best);
    memcpy(vectors, &at, sizeof vectors);
#if defined(__AVX512F__)
    const float most = _mm512_reduce_max_ps(best);
#else
    float most = scores[0];
    for (int lane = 1; lane < kVector; ++lane) most = scores[lane] > most ? scores[lane] : most;
#endif
    uint32_t first = 0xFFFFFFFF;
    for (uint32_t bits = not_below(best, broadcast(most)); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        const uint32_t centre = static_cast<uint32_t>(vectors[lane] * kVector + lane);
        first = centre < first ? centre : first;
    }
    return first;
}

template <int ROWS>
inline void nearest_group(const float* points, int64_t width, const float* centres, int64_t panels, uint32_t* nearest) {
    Vector best[ROWS];
    Integers at[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        best[r] = broadcast(-__builtin_inff());
        at[r] = Integers{};
    }
    for (int64_t panel = 0; panel < panels; ++panel, centres += width * 2 * kVector) {
        Vector sums[ROWS][2] = {};
        for (int64_t d = 0; d < width; ++d) dot_steps<ROWS, 2, 1>(points + d, width, centres + d * 2 * kVector, sums);
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

void nearest(const float* points, int64_t count, int64_t width, const float* centres, int64_t panels, uint32_t* nearest) {
    int64_t r = 0;
    for (; r + kNearestRows <= count; r += kNearestRows)
        nearest_group<kNearestRows>(points + r * width, width, centres, panels, nearest + r);
    for (; r < count; ++r) nearest_group<1>(points + r * width, width, centres, panels, nearest + r);
}
