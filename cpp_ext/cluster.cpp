#include "cluster.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "parallel.hpp"

namespace dqe::cpu {
namespace {

constexpr float kCentreCode = 127.0f;

int64_t coded_points_width(int64_t width) { return (width + 3) / 4 * 4; }

float largest_of(const float* numbers, int64_t count) {
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(numbers[i]));
    return largest;
}

// (axis_count, width) as panels [axis_count / lanes][width][lanes], the last filled up with zeros.
AlignedVector<float> packed_axes(const float* axes, int64_t axis_count, int64_t width, int64_t lanes) {
    AlignedVector<float> panels(static_cast<size_t>((axis_count + lanes - 1) / lanes * width * lanes), 0.0f);
    for (int64_t a = 0; a < axis_count; ++a)
        for (int64_t d = 0; d < width; ++d) panels[static_cast<size_t>((a / lanes * width + d) * lanes + a % lanes)] = axes[a * width + d];
    return panels;
}

void along_panel(const TileKernels& kernels, const Rows& rows, const float* panel, float* scores) {
    const Ahead nothing = {reinterpret_cast<const char*>(rows.data), 0, 0, 1};
    kernels.dot_panel(rows, panel, kernels.narrow, nothing, scores);
}

// Every `stride`-th of (count, width) points.
std::vector<uint8_t> encoded(const TileKernels& kernels, const float* points, int64_t count, int64_t width, int64_t stride, float largest) {
    const int64_t size = coded_points_width(width), some = (count + stride - 1) / stride;
    std::vector<uint8_t> codes(static_cast<size_t>(some * size));
    const std::vector<float> factors(static_cast<size_t>(some), kPointCode / largest);
    kernels.code_points(points, some, stride * width, width, factors.data(), codes.data(), size);
    return codes;
}

// Lloyd's iterations over one group.
void refine(const TileKernels& kernels, const float* points, int64_t count, int64_t width, int64_t most, int rounds, float largest,
            float* centres, int64_t centre_count) {
    const int64_t stride = std::max<int64_t>(1, count / most / centre_count), some = (count + stride - 1) / stride;
    for (int64_t c = 0; c < centre_count; ++c) std::copy_n(points + c * some / centre_count * stride * width, width, centres + c * width);
    const std::vector<uint8_t> codes = encoded(kernels, points, count, width, stride, largest);
    std::vector<uint32_t> nearest(static_cast<size_t>(some));
    std::vector<double> sums(static_cast<size_t>(centre_count * width)), sizes(static_cast<size_t>(centre_count));
    for (int round = 0; round < rounds; ++round) {
        const Centres coded(kernels, centres, centre_count, width, largest);
        kernels.nearest(codes.data(), some, coded_points_width(width), coded.coded(), nearest.data());
        std::fill(sums.begin(), sums.end(), 0.0);
        std::fill(sizes.begin(), sizes.end(), 0.0);
        for (int64_t i = 0; i < some; ++i) {
            const int64_t own = nearest[static_cast<size_t>(i)];
            ++sizes[static_cast<size_t>(own)];
            double* sum = sums.data() + own * width;
            for (int64_t d = 0; d < width; ++d) sum[d] += points[i * stride * width + d];
        }
        for (int64_t c = 0; c < centre_count; ++c)
            for (int64_t d = 0; d < width && sizes[static_cast<size_t>(c)] > 0.0; ++d)
                centres[c * width + d] = static_cast<float>(sums[static_cast<size_t>(c * width + d)] / sizes[static_cast<size_t>(c)]);
    }
}

}  // namespace

void gather_directions(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const int64_t* rows, int64_t count,
                       float* directions, uint8_t* known, int threads) {
    constexpr int64_t kSome = 1024, kAhead = 16;
    const TileKernels& kernels = *available_tile_kernels()[0];
    const auto token_at = [&](int64_t row) {
        const TokenSource* source = sources;
        for (; source + 1 < sources + source_count && row >= source->count * tokens; ++source) row -= source->count * tokens;
        return std::pair{source, static_cast<const char*>(source->data) + row * width * (source->half ? 2 : 4)};
    };
    for_each_part((count + kSome - 1) / kSome, threads, [&](int, int64_t part) {
        const int64_t end = std::min(count, (part + 1) * kSome);
        for (int64_t i = part * kSome; i < end; ++i) {
            if (i + kAhead < end) {
                const auto [source, next] = token_at(rows[i + kAhead]);
                for (int64_t at = 0; at < std::min<int64_t>(width * (source->half ? 2 : 4), 512); at += 64) __builtin_prefetch(next + at);
            }
            float* to = directions + i * width;
            const auto [source, token] = token_at(rows[i]);
            if (source->half)
                kernels.widen(reinterpret_cast<const uint16_t*>(token), width, to);
            else
                std::copy_n(reinterpret_cast<const float*>(token), width, to);
            const double norm = std::sqrt(kernels.products(to, to, width).with_itself);
            known[i] = norm > 1e-36 && norm < 1e36;  // else its inverse is no normal float32
            const auto inverse = static_cast<float>(1.0 / norm);
            for (int64_t d = 0; d < width; ++d) to[d] = known[i] ? to[d] * inverse : 0.0f;
        }
    });
}

void project(const float* points, int64_t count, int64_t width, const float* axes, int64_t axis_count, float* along, int threads) {
    constexpr int64_t kSome = 1024;
    const TileKernels& kernels = *available_tile_kernels()[0];
    const AlignedVector<float> panels = packed_axes(axes, axis_count, width, kernels.narrow);
    for_each_part((count + kSome - 1) / kSome, threads, [&](int, int64_t part) {
        const int64_t first = part * kSome, some = std::min(kSome, count - first), lanes = kernels.narrow;
        AlignedVector<float> scores(static_cast<size_t>(some * lanes));
        for (int64_t from = 0; from < axis_count; from += lanes) {
            along_panel(kernels, {points + first * width, some, width}, panels.data() + from * width, scores.data());
            for (int64_t i = 0; i < some; ++i)
                std::copy_n(scores.data() + i * lanes, std::min(lanes, axis_count - from), along + (first + i) * axis_count + from);
        }
    });
}

void mean_directions(const float* points, int64_t count, int64_t width, const uint32_t* group_of, int64_t groups, float* directions,
                     int threads) {
    std::vector<double> sums(static_cast<size_t>(groups * width), 0.0);
    constexpr int64_t kSome = 32;  // columns, which one thread adds up
    for_each_part((width + kSome - 1) / kSome, threads, [&](int, int64_t part) {
        const int64_t begin = part * kSome, end = std::min(width, begin + kSome);
        for (int64_t i = 0; i < count; ++i) {
            double* sum = sums.data() + int64_t{group_of[i]} * width;
            for (int64_t d = begin; d < end; ++d) sum[d] += points[i * width + d];
        }
    });
    for (int64_t g = 0; g < groups; ++g) {
        double* sum = sums.data() + g * width;
        double norm = std::sqrt(std::inner_product(sum, sum + width, sum, 0.0));
        if (norm == 0.0) norm = sum[0] = 1.0;
        for (int64_t d = 0; d < width; ++d) directions[g * width + d] = static_cast<float>(sum[d] / norm);
    }
}

Centres::Centres(const TileKernels& kernels, const float* centres, int64_t count, int64_t width, float largest)
    : panels_((count + kernels.wide - 1) / kernels.wide) {
    const int64_t lanes = kernels.wide, size = coded_points_width(width);
    const float factor = kCentreCode / largest;
    codes_.assign(static_cast<size_t>(panels_ * size * lanes), int8_t{0});
    offsets_.assign(static_cast<size_t>(panels_ * lanes), std::numeric_limits<int32_t>::min());  // those that fill up are never nearest
    for (int64_t c = 0; c < count; ++c) {
        int8_t* to = codes_.data() + c / lanes * size * lanes + c % lanes * 4;
        int64_t sum = 0, square = 0;
        for (int64_t d = 0; d < width; ++d) {
            const float scaled = std::clamp(centres[c * width + d] * factor, -kCentreCode, kCentreCode);
            const auto code = static_cast<int32_t>(std::isnan(scaled) ? 0.0f : std::round(scaled));
            to[d / 4 * 4 * lanes + d % 4] = static_cast<int8_t>(code);
            sum += code, square += code * code;
        }
        const double half = 0.5 * static_cast<double>(square) * (kPointCode / kCentreCode);
        offsets_[static_cast<size_t>(c)] = static_cast<int32_t>(-std::round(half) - static_cast<double>((kPointCode + 1) * sum));
    }
}

void cluster(const float* points, int64_t width, const int64_t* begins, int64_t groups, const int64_t* offsets, int64_t most, int rounds,
             float* centres, uint32_t* nearest, int threads) {
    const TileKernels& kernels = *available_tile_kernels()[0];
    const float largest = std::max(largest_of(points, begins[groups] * width), 0x1p-60f);
    for_each_part(groups, threads, [&](int, int64_t g) {
        const int64_t count = begins[g + 1] - begins[g];
        if (count > 0)
            refine(kernels, points + begins[g] * width, count, width, most, rounds, largest, centres + offsets[g] * width,
                   offsets[g + 1] - offsets[g]);
    });
    struct Piece {
        int64_t group, begin, count;
    };
    std::vector<Piece> pieces;
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t begin = begins[g]; begin < begins[g + 1]; begin += Assigner::kSome)
            pieces.push_back({g, begin, std::min(Assigner::kSome, begins[g + 1] - begin)});
    for_each_part(static_cast<int64_t>(pieces.size()), threads, [&](int, int64_t p) {
        const auto [g, begin, count] = pieces[static_cast<size_t>(p)];
        const Centres coded(kernels, centres + offsets[g] * width, offsets[g + 1] - offsets[g], width, largest);
        const std::vector<uint8_t> codes = encoded(kernels, points + begin * width, count, width, 1, largest);
        kernels.nearest(codes.data(), count, coded_points_width(width), coded.coded(), nearest + begin);
    });
}

Assigner::Assigner(const TokenTree& tree, int64_t width)
    : kernels_(*available_tile_kernels()[0]),
      tree_(tree),
      width_(width),
      largest_(std::max(largest_of(tree.leaves, tree.offsets[tree.root_count] * tree.axis_count), 0x1p-60f)),
      axes_(packed_axes(tree.axes, tree.axis_count, width, kernels_.narrow)),
      roots_(kernels_, tree.roots, tree.root_count, tree.axis_count, largest_) {
    for (int64_t r = 0; r < tree.root_count; ++r)
        leaves_.emplace_back(kernels_, tree.leaves + tree.offsets[r] * tree.axis_count, tree.offsets[r + 1] - tree.offsets[r],
                             tree.axis_count, largest_);
}

void Assigner::assign(const float* tokens, int64_t count, Scratch& scratch) const {
    const int64_t lanes = kernels_.narrow, size = coded_points_width(tree_.axis_count);
    for (auto* numbers : {&scratch.roots, &scratch.order, &scratch.leaves}) numbers->resize(static_cast<size_t>(count));
    for (auto* codes : {&scratch.points, &scratch.sorted}) codes->resize(static_cast<size_t>(count * size));
    scratch.along.resize(static_cast<size_t>(count * lanes));
    scratch.factors.resize(static_cast<size_t>(count));
    kernels_.squares({tokens, count, width_}, scratch.factors.data());
    for (float& number : scratch.factors) number = kPointCode / largest_ / std::sqrt(number);
    for (int64_t from = 0; from < tree_.axis_count; from += lanes) {
        along_panel(kernels_, {tokens, count, width_}, axes_.data() + from * width_, scratch.along.data());
        kernels_.code_points(scratch.along.data(), count, lanes, std::min(lanes, tree_.axis_count - from), scratch.factors.data(),
                             scratch.points.data() + from, size);
    }
    kernels_.nearest(scratch.points.data(), count, size, roots_.coded(), scratch.roots.data());
    scratch.ends.assign(static_cast<size_t>(tree_.root_count) + 1, 0);
    for (const uint32_t own : scratch.roots) ++scratch.ends[own + 1];
    std::partial_sum(scratch.ends.begin(), scratch.ends.end(), scratch.ends.begin());
    scratch.next.assign(scratch.ends.begin(), scratch.ends.end() - 1);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = scratch.next[scratch.roots[static_cast<size_t>(i)]]++;
        scratch.order[static_cast<size_t>(at)] = static_cast<uint32_t>(i);
        for (int64_t d = 0; d < size; d += 4) std::memcpy(scratch.sorted.data() + at * size + d, scratch.points.data() + i * size + d, 4);
    }
    for (int64_t r = 0; r < tree_.root_count; ++r) {
        const int64_t begin = scratch.ends[static_cast<size_t>(r)], end = scratch.ends[static_cast<size_t>(r) + 1];
        if (begin == end) continue;
        const Centres& own = leaves_[static_cast<size_t>(r)];
        uint32_t* leaf = scratch.leaves.data();
        kernels_.nearest(scratch.sorted.data() + begin * size, end - begin, size, own.coded(), leaf + begin);
        for (int64_t at = begin; at < end; ++at) leaf[at] += static_cast<uint32_t>(tree_.offsets[r]);
    }
}

void assign_tokens(const float* rows, int64_t count, int64_t width, const TokenTree& tree, uint32_t* assigned, int threads) {
    const Assigner assigner(tree, width);
    std::vector<Assigner::Scratch> scratches(static_cast<size_t>(threads));
    for_each_part((count + Assigner::kSome - 1) / Assigner::kSome, threads, [&](int thread, int64_t part) {
        Assigner::Scratch& scratch = scratches[static_cast<size_t>(thread)];
        const int64_t first = part * Assigner::kSome, some = std::min(Assigner::kSome, count - first);
        assigner.assign(rows + first * width, some, scratch);
        for (int64_t at = 0; at < some; ++at)
            assigned[first + scratch.order[static_cast<size_t>(at)]] = scratch.leaves[static_cast<size_t>(at)];
    });
}

}  // namespace dqe::cpu
