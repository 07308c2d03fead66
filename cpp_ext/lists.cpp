#include "lists.hpp"

#include <numeric>
#include <vector>

#include "aligned.hpp"
#include "parallel.hpp"
#include "screen.hpp"

namespace dqe::cpu {
namespace {

// Panels of centres, [panel][width + 1][wide]: the last number of a centre is what its product with a point of last number n is less by,
// half its square, so that the greatest product is that of the nearest centre to point / n.
struct Centres {
    AlignedVector<float> packed;
    int64_t panels;

    Centres(const TileKernels& kernels, const float* centres, int64_t count, int64_t width)
        : panels((count + kernels.wide - 1) / kernels.wide) {
        const int64_t lanes = kernels.wide, size = (width + 1) * lanes;
        packed.assign(static_cast<size_t>(panels * size), 0.0f);
        for (int64_t c = 0; c < panels * lanes; ++c) {
            float* to = packed.data() + c / lanes * size + c % lanes;
            double square = 0.0;
            for (int64_t d = 0; d < width && c < count; ++d) {
                to[d * lanes] = centres[c * width + d];
                square += double{to[d * lanes]} * to[d * lanes];
            }
            to[width * lanes] = c < count ? static_cast<float>(-0.5 * square) : -0x1p100f;  // those that fill up are never nearest
        }
    }
};

}  // namespace

void find_nearest(const float* points, int64_t count, int64_t width, const float* centres, int64_t centre_count, uint32_t* nearest,
                  int threads) {
    constexpr int64_t kSome = 2048;
    const TileKernels* kernels = available_tile_kernels()[0];
    const Centres packed(*kernels, centres, centre_count, width);
    for_each_part((count + kSome - 1) / kSome, useful_threads(threads, count * centre_count * width), [&](int, int64_t part) {
        const int64_t first = part * kSome, some = std::min(kSome, count - first);
        std::vector<float> own(static_cast<size_t>(some * (width + 1)), 1.0f);
        for (int64_t i = 0; i < some; ++i) std::copy_n(points + (first + i) * width, width, own.begin() + i * (width + 1));
        kernels->nearest(own.data(), some, width + 1, packed.packed.data(), packed.panels, nearest + first);
    });
}

void assign_tokens(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const TokenTree& tree,
                   uint32_t* assigned, int threads) {
    const TileKernels* kernels = available_tile_kernels()[0];
    const int64_t lanes = kernels->wide, axis_panels = (tree.axis_count + lanes - 1) / lanes, size = tree.axis_count + 1;
    AlignedVector<float> axes(static_cast<size_t>(axis_panels * width * lanes), 0.0f);
    for (int64_t a = 0; a < tree.axis_count; ++a)
        for (int64_t d = 0; d < width; ++d)
            axes[static_cast<size_t>((a / lanes * width + d) * lanes + a % lanes)] = tree.axes[a * width + d];
    const Centres roots(*kernels, tree.roots, tree.root_count, tree.axis_count);
    std::vector<Centres> leaves;
    for (int64_t r = 0; r < tree.root_count; ++r)
        leaves.emplace_back(*kernels, tree.leaves + tree.offsets[r] * tree.axis_count, tree.offsets[r + 1] - tree.offsets[r],
                            tree.axis_count);
    // Many at a time, so that a root's leaves stay in the first-level cache for some points.
    const int64_t most = std::max<int64_t>(1, 8192 / tokens);
    for (int64_t s = 0; s < source_count; ++s) {
        const TokenSource& source = sources[s];
        uint32_t* const to = assigned;
        assigned += source.count * tokens;
        for_each_part((source.count + most - 1) / most, threads, [&](int, int64_t part) {
            const int64_t first = part * most * tokens, count = std::min(most, source.count - part * most) * tokens;
            std::vector<float> widened(static_cast<size_t>(source.half ? count * width : 0));
            const float* values = static_cast<const float*>(source.data) + first * width;
            if (source.half) {
                kernels->widen(static_cast<const uint16_t*>(source.data) + first * width, count * width, widened.data());
                values = widened.data();
            }
            AlignedVector<float> along(static_cast<size_t>(count * lanes));
            std::vector<float> points(static_cast<size_t>(count * size)), sorted(points.size());
            for (int64_t panel = 0; panel < axis_panels; ++panel) {
                const Ahead nothing = {reinterpret_cast<const char*>(values), 0, 0, 1};
                kernels->dot_panel({values, count, width}, axes.data() + panel * width * lanes, static_cast<int>(lanes), nothing,
                                   along.data());
                const int64_t from = panel * lanes, some = std::min(lanes, tree.axis_count - from);
                for (int64_t i = 0; i < count; ++i) std::copy_n(along.begin() + i * lanes, some, points.begin() + i * size + from);
            }
            for (int64_t i = 0; i < count; ++i) {
                const float norm =
                    static_cast<float>(std::sqrt(kernels->products(values + i * width, values + i * width, width).with_itself));
                if (norm <= kLargestNorm)
                    points[static_cast<size_t>((i + 1) * size - 1)] = norm;
                else
                    std::fill_n(points.begin() + i * size, size, 0.0f);  // no direction: any list
            }
            std::vector<uint32_t> root(static_cast<size_t>(count)), order(root.size()), leaf(root.size());
            kernels->nearest(points.data(), count, size, roots.packed.data(), roots.panels, root.data());
            std::vector<int64_t> ends(static_cast<size_t>(tree.root_count) + 1, 0);
            for (const uint32_t own : root) ++ends[own + 1];
            std::partial_sum(ends.begin(), ends.end(), ends.begin());
            std::vector<int64_t> next(ends.begin(), ends.end() - 1);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = next[root[static_cast<size_t>(i)]]++;
                order[static_cast<size_t>(at)] = static_cast<uint32_t>(i);
                std::copy_n(points.begin() + i * size, size, sorted.begin() + at * size);
            }
            for (int64_t r = 0; r < tree.root_count; ++r) {
                const int64_t begin = ends[static_cast<size_t>(r)], end = ends[static_cast<size_t>(r) + 1];
                const Centres& own = leaves[static_cast<size_t>(r)];
                kernels->nearest(sorted.data() + begin * size, end - begin, size, own.packed.data(), own.panels, leaf.data() + begin);
                for (int64_t at = begin; at < end; ++at)
                    to[first + order[static_cast<size_t>(at)]] = static_cast<uint32_t>(tree.offsets[r]) + leaf[static_cast<size_t>(at)];
            }
        });
    }
}

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
                const Products found = kernels->products(values + token * width, direction, width);
                const double norm = std::sqrt(found.with_itself);
                const bool bounded = norm <= kLargestNorm;  // not NaN either
                list[at] = bounded ? assigned[at] : static_cast<uint32_t>(count);
                codes[at] = cosine_code(bounded && norm > 0.0 ? found.with_other / norm - 2e-6 : 1.0);  // |u| is 1 to 1e-6
                const double least = std::max(norm, kLeastNorm);  // with less, sums that underflow could exceed Reach's slack
                norms[at] = std::nextafter(static_cast<float>(least * (1.0 + 0x1p-30)), std::numeric_limits<float>::infinity());
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
