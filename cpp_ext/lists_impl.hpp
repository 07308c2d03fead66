// Which lists a query cannot skip (lists.hpp), for one instruction set. Included by tiles_impl.hpp, within its namespaces.
//
// The condition of Reach::last_code, for the list's widest token and without a root. With m and cos φ as there, a list is ruled out where
//     x < |q| cos ρ,    m > 0,    gap = m - x cos ρ > 0    and    (|q|² - x²) (1 - cos² ρ) < gap².
// In float32, gap is off by 2^-22 max(|q|, m) at most, its square by 2^-20 max(|q|, m)², and the other side by 2^-21 |q|²: `room` is more
// than twice their sum. m is off by 2^-23 m and 2^-23 slack, so that one above 2^-20 |q| is positive, and x by less than its margin.
int64_t find_lists(const float* products, const float* widest, const float* longest, int64_t count, float norm, float slack,
                   float threshold, uint32_t* lists) {
    const Vector norms = broadcast(norm), least = norms * 0x1p-20f, square = norms * norms, zero = {};
    int64_t found = 0;
    for (int64_t at = 0; at < count; at += kVector) {
        const int64_t part = count - at < kVector ? count - at : kVector;
        const bool whole = part == kVector;
        const Vector along = (whole ? load(products + at) : load_part(products + at, part)) + norms * 2e-6f;
        const Vector cosine = whole ? load(widest + at) : load_part(widest + at, part);
        const Vector most = broadcast(threshold) / (whole ? load(longest + at) : load_part(longest + at, part)) - slack;
        const Vector gap = most - along * cosine, across = (square - along * along) * (1.0f - cosine * cosine);
        const Vector room = (square + most * most) * 5e-6f;
        uint32_t bits =
            not_below(along, norms * cosine) | not_below(least, most) | not_below(zero, gap) | not_below(across + room, gap * gap);
        if (!whole) bits &= (1u << part) - 1;
        for (; bits; bits &= bits - 1) lists[found++] = static_cast<uint32_t>(at + __builtin_ctz(bits));
    }
    return found;
}
