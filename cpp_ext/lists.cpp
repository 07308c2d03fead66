#include "lists.hpp"

#include <vector>

#include "parallel.hpp"

namespace dqe::cpu {
namespace {

struct Products {
    double with_direction = 0.0, with_itself = 0.0;
};

// In eight sums each, for the processor to add side by side.
Products products(const float* token, const float* direction, int64_t width) {
    double with_direction[8] = {}, with_itself[8] = {};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8)
        for (int lane = 0; lane < 8; ++lane) {
            const double value = token[d + lane];
            with_direction[lane] += value * direction[d + lane];
            with_itself[lane] += value * value;
        }
    Products all;
    for (; d < width; ++d) {
        all.with_direction += double{token[d]} * direction[d];
        all.with_itself += double{token[d]} * token[d];
    }
    for (int lane = 0; lane < 8; ++lane) all.with_direction += with_direction[lane], all.with_itself += with_itself[lane];
    return all;
}

}  // namespace

void fill_lists(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const float* directions, int64_t count,
                const uint32_t* assigned, float* longest, float* widest, int64_t* starts, uint32_t* rows, uint16_t* cosines, int threads) {
    const TileKernels* kernels = available_tile_kernels()[0];
    int64_t size = 0;
    for (int64_t s = 0; s < source_count; ++s) size += sources[s].count * tokens;
    std::vector<uint16_t> codes(static_cast<size_t>(size));
    std::vector<float> norms(static_cast<size_t>(size));
    std::vector<uint32_t> list(static_cast<size_t>(size));
    int64_t first = 0;
    for (int64_t s = 0; s < source_count; ++s) {
        const TokenSource& source = sources[s];
        for_each_part(source.count, threads, [&](int, int64_t item) {
            std::vector<float> widened(static_cast<size_t>(source.half ? tokens * width : 0));
            const float* values = static_cast<const float*>(source.data) + item * tokens * width;
            if (source.half) {
                kernels->widen(static_cast<const uint16_t*>(source.data) + item * tokens * width, tokens * width, widened.data());
                values = widened.data();
            }
            for (int64_t token = 0; token < tokens; ++token) {
                const auto at = static_cast<size_t>(first + item * tokens + token);
                const float* direction = directions + int64_t{assigned[at]} * width;
                const Products found = products(values + token * width, direction, width);
                const double norm = std::sqrt(found.with_itself);
                const bool bounded = norm <= kLargestNorm;  // not NaN either
                list[at] = bounded ? assigned[at] : static_cast<uint32_t>(count);
                codes[at] = cosine_code(bounded && norm > 0.0 ? found.with_direction / norm - 2e-6 : 1.0);  // |u| is 1 to 1e-6
                norms[at] = std::nextafter(static_cast<float>(norm * (1.0 + 0x1p-30)), std::numeric_limits<float>::infinity());
            }
        });
        first += source.count * tokens;
    }
    std::vector<int64_t> sizes(static_cast<size_t>(count) + 1, 0);
    for (const uint32_t own : list) ++sizes[own];
    starts[0] = sizes[static_cast<size_t>(count)];
    for (int64_t c = 0; c < count; ++c) starts[c + 1] = starts[c] + sizes[static_cast<size_t>(c)];
    std::vector<int64_t> next(starts, starts + count);
    next.push_back(0);
    std::vector<uint64_t> sorted(static_cast<size_t>(size));  // code above row
    for (size_t at = 0; at < list.size(); ++at)
        sorted[static_cast<size_t>(next[list[at]]++)] = uint64_t{codes[at]} << 32 | static_cast<uint32_t>(at);
    for_each_part(count + 1, threads, [&](int, int64_t part) {
        const int64_t from = part == count ? 0 : starts[part], to = part == count ? starts[0] : starts[part + 1];
        std::sort(sorted.begin() + from, sorted.begin() + to);
        float most = 0.0f;
        for (int64_t at = from; at < to; ++at) {
            rows[at] = static_cast<uint32_t>(sorted[static_cast<size_t>(at)]);
            cosines[at] = static_cast<uint16_t>(sorted[static_cast<size_t>(at)] >> 32);
            most = std::max(most, norms[rows[at]]);
        }
        if (part == count) return;
        longest[part] = most;
        const double cosine = from < to ? cosines[from] / 32767.5 - 1.0 : 1.0;
        widest[part] = std::nextafter(static_cast<float>(cosine), -2.0f);
    });
}

}  // namespace dqe::cpu
