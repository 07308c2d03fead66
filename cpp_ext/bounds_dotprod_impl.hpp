// Products of codes on arm64, for panels with its 8-bit dot product (FEAT_DotProd). Included by bounds_impl.hpp, within its namespaces.
//
// SDOT multiplies signed bytes, and USDOT is of later processors: rows' unsigned codes are taken less 128. <codes, query> + offset
// is then the sum itself, for that is what the offset undoes (CodedQueries in tiles.hpp).

inline int8x16_t signed_codes(const uint8_t* codes) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes), vdupq_n_u8(0x80))); }

inline int8x16_t four_codes(const void* codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// sums[lane] += the four products of a lane's bytes; two of -128 * -128 would not fit the 16 bits of what stands in for SDOT.
inline int32x4_t add_products(int32x4_t sums, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sums, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

#if defined(__ARM_FEATURE_DOTPROD)
// Calls visit(first, dots) with <codes, query> + offset of a group of rows and a panel.
template <int ROWS, int VECTORS, typename Visit>
inline void visit_group(const CodedRows& rows, int64_t first, const CodedQueries& queries, Visit& visit) {
    constexpr int64_t kLanes = VECTORS * kVector, kStep = 16;
    int32x4_t sums[ROWS][VECTORS] = {};
    const uint8_t* codes = rows.codes + first * rows.width;
    for (int64_t d = 0; d < rows.width; d += kStep) {
        if (d % 64 == 0)
            for (int r = 0; r < ROWS; ++r) __builtin_prefetch(codes + ROWS * (rows.width + d) + r * 64, 0, 2);  // as in dot_group
        int8x16_t query[4][VECTORS];
#pragma GCC unroll 4
        for (int four = 0; four < 4; ++four)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) query[four][v] = vld1q_s8(queries.codes + (d + 4 * four) * kLanes + 16 * v);
        const uint8_t* row = codes + d;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r, row += rows.width) {
            const int8x16_t own = signed_codes(row);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                sums[r][v] = vdotq_laneq_s32(sums[r][v], query[0][v], own, 0);
                sums[r][v] = vdotq_laneq_s32(sums[r][v], query[1][v], own, 1);
                sums[r][v] = vdotq_laneq_s32(sums[r][v], query[2][v], own, 2);
                sums[r][v] = vdotq_laneq_s32(sums[r][v], query[3][v], own, 3);
            }
        }
    }
    Vector dots[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) dots[r][v] = vcvtq_f32_s32(sums[r][v]);
    visit(first, dots);
}

template <int VECTORS, typename Visit>
void visit_panel(const CodedRows& rows, const CodedQueries& queries, Visit& visit) {
    constexpr int kRows = 16 / VECTORS;  // sixteen sums, eight of queries and one of codes fit the registers
    int64_t r = 0;
    for (; r + kRows <= rows.count; r += kRows) visit_group<kRows, VECTORS>(rows, r, queries, visit);
    for (; r + 4 <= rows.count; r += 4) visit_group<4, VECTORS>(rows, r, queries, visit);
    for (; r < rows.count; ++r) visit_group<1, VECTORS>(rows, r, queries, visit);
}
#endif
