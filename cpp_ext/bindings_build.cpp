// dqe_engine._kernels: what makes codes, prefixes and lists of items. Checked as in bindings.cpp.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "bindings.hpp"
#include "lists.hpp"
#include "parallel.hpp"
#include "prefix.hpp"
#include "screen.hpp"

namespace dqe::cpu {
namespace {

using namespace nb::literals;

struct Sources {
    std::vector<TokenSource> sources;
    int64_t tokens, width, size;  // size: tokens of all
};

Sources sources_of(const std::vector<Items>& shards) {
    if (shards.empty()) throw std::invalid_argument("items: expected at least one shard");
    Sources found = {{}, static_cast<int64_t>(shards[0].shape(1)), static_cast<int64_t>(shards[0].shape(2)), 0};
    if (found.tokens == 0 || found.width == 0) throw std::invalid_argument("items: expected at least one token of at least one number");
    for (const Items& items : shards) {
        const auto count = static_cast<int64_t>(items.shape(0));
        expect("items", items, {count, found.tokens, found.width});
        found.sources.push_back({items.data(), count, is_half(items)});
        found.size += count * found.tokens;
    }
    return found;
}

constexpr int64_t kCodedRows = 2048;  // that one thread takes at once

void encode_adapter(Items items, Array<uint8_t, 3> codes, Array<float, 2> scales, Array<float, 2> errors, Array<float, 2> norms,
                    int threads) {
    const auto count = static_cast<int64_t>(items.shape(0)), tokens = static_cast<int64_t>(items.shape(1));
    const auto width = static_cast<int64_t>(items.shape(2));
    expect("codes", codes, {count, tokens, code_width(width)});
    expect("scales", scales, {count, tokens});
    expect("errors", errors, {count, tokens});
    expect("norms", norms, {count, tokens});
    if (width > kMostCodedWidth) throw std::invalid_argument("items: tokens too wide for 32-bit sums of codes");
    expect_threads(threads);
    const bool half = is_half(items);
    const TileKernels* kernels = available_tile_kernels()[0];
    nb::gil_scoped_release release;
    const int workers = useful_threads(threads, count * tokens * width);
    // Some items at a time: with one each, threads would take turns at the counter and at the lines that scales and norms share.
    const int64_t some = std::clamp<int64_t>(kCodedRows / tokens, 1, std::max<int64_t>(1, count / (8 * workers)));
    std::vector<std::vector<float>> widened(static_cast<size_t>(workers),
                                            std::vector<float>(static_cast<size_t>(half ? tokens * width : 0)));
    for_each_part((count + some - 1) / some, workers, [&](int thread, int64_t part) {
        for (int64_t i = part * some; i < std::min(count, (part + 1) * some); ++i) {
            const int64_t at = i * tokens;
            const float* rows = static_cast<const float*>(items.data()) + at * width;
            if (half) {
                float* own = widened[static_cast<size_t>(thread)].data();
                kernels->widen(static_cast<const uint16_t*>(items.data()) + at * width, tokens * width, own);
                rows = own;
            }
            encode_rows(rows, tokens, width, codes.data() + at * code_width(width), scales.data() + at, errors.data() + at,
                        norms.data() + at);
        }
    });
}

TokenTree tree_of(const Array<const float, 2>& axes, const Array<const float, 2>& roots, const Array<const float, 2>& leaves,
                  const Array<const int64_t, 1>& offsets, int64_t width) {
    const auto axis_count = static_cast<int64_t>(axes.shape(0)), root_count = static_cast<int64_t>(roots.shape(0));
    const auto leaf_count = static_cast<int64_t>(leaves.shape(0));
    if (axis_count == 0 || root_count == 0) throw std::invalid_argument("roots: expected at least one, in at least one axis");
    expect("axes", axes, {axis_count, width});
    expect("roots", roots, {root_count, axis_count});
    expect("leaves", leaves, {leaf_count, axis_count});
    expect("offsets", offsets, {root_count + 1});
    for (int64_t r = 0; r < root_count; ++r)
        if (offsets(r + 1) <= offsets(r)) throw std::invalid_argument("offsets: expected a leaf at least for each root");
    if (offsets(0) != 0 || offsets(root_count) != leaf_count) throw std::invalid_argument("offsets: expected to cover all leaves");
    return {axis_count, root_count, axes.data(), roots.data(), leaves.data(), offsets.data()};
}

void fill_lists_adapter(std::vector<Items> shards, Array<const float, 2> axes, Array<const float, 2> roots, Array<const float, 2> leaves,
                        Array<const int64_t, 1> offsets, Array<const float, 2> directions, Array<float, 1> longest, Array<float, 1> widest,
                        Array<int64_t, 1> starts, Array<uint32_t, 1> rows, Array<uint16_t, 1> cosines, int threads) {
    const Sources given = sources_of(shards);
    const auto [sources, tokens, width, size] = given;
    if (size >= 0xFFFFFFFF) throw std::invalid_argument("items: expected fewer than 2^32 - 1 tokens");
    const TokenTree tree = tree_of(axes, roots, leaves, offsets, width);
    const auto count = static_cast<int64_t>(leaves.shape(0));
    expect("directions", directions, {count, width});
    expect("longest", longest, {count});
    expect("widest", widest, {count});
    expect("starts", starts, {count + 1});
    expect("rows", rows, {size});
    expect("cosines", cosines, {size});
    expect_threads(threads);
    for (int64_t c = 0; c < count; ++c) {
        double square = 0.0;
        for (int64_t d = 0; d < width; ++d) square += double{directions(c, d)} * directions(c, d);
        if (!(std::abs(std::sqrt(square) - 1.0) <= 1e-6)) throw std::invalid_argument("directions: expected unit vectors");
    }
    nb::gil_scoped_release release;
    fill_lists(sources.data(), static_cast<int64_t>(sources.size()), tokens, width, tree, directions.data(), longest.data(), widest.data(),
               starts.data(), rows.data(), cosines.data(), threads);
}

void gather_directions_adapter(std::vector<Items> shards, Array<const int64_t, 1> rows, Array<float, 2> directions, Array<uint8_t, 1> known,
                               int threads) {
    const Sources given = sources_of(shards);
    const auto count = static_cast<int64_t>(rows.shape(0));
    for (int64_t i = 0; i < count; ++i)
        if (rows(i) < 0 || rows(i) >= given.size) throw std::invalid_argument("rows: not a token");
    expect("directions", directions, {count, given.width});
    expect("known", known, {count});
    expect_threads(threads);
    nb::gil_scoped_release release;
    gather_directions(given.sources.data(), static_cast<int64_t>(given.sources.size()), given.tokens, given.width, rows.data(), count,
                      directions.data(), known.data(), threads);
}

void project_adapter(Array<const float, 2> points, Array<const float, 2> axes, Array<float, 2> along, int threads) {
    const auto count = static_cast<int64_t>(points.shape(0)), width = static_cast<int64_t>(points.shape(1));
    const auto axis_count = static_cast<int64_t>(axes.shape(0));
    expect("axes", axes, {axis_count, width});
    expect("along", along, {count, axis_count});
    expect_threads(threads);
    nb::gil_scoped_release release;
    project(points.data(), count, width, axes.data(), axis_count, along.data(), threads);
}

void mean_directions_adapter(Array<const float, 2> points, Array<const uint32_t, 1> group_of, Array<float, 2> directions, int threads) {
    const auto count = static_cast<int64_t>(points.shape(0)), width = static_cast<int64_t>(points.shape(1));
    const auto groups = static_cast<int64_t>(directions.shape(0));
    expect("group_of", group_of, {count});
    for (int64_t i = 0; i < count; ++i)
        if (group_of(i) >= groups) throw std::invalid_argument("group_of: not a group");
    expect("directions", directions, {groups, width});
    expect_threads(threads);
    nb::gil_scoped_release release;
    mean_directions(points.data(), count, width, group_of.data(), groups, directions.data(), threads);
}

void cluster_adapter(Array<const float, 2> points, Array<const int64_t, 1> begins, Array<const int64_t, 1> offsets, int64_t most,
                     int rounds, Array<float, 2> centres, Array<uint32_t, 1> nearest, int threads) {
    const auto count = static_cast<int64_t>(points.shape(0)), width = static_cast<int64_t>(points.shape(1));
    const auto groups = static_cast<int64_t>(begins.shape(0)) - 1, centre_count = static_cast<int64_t>(centres.shape(0));
    if (groups < 0 || begins(0) != 0 || begins(groups) != count) throw std::invalid_argument("begins: expected to cover all points");
    expect("offsets", offsets, {groups + 1});
    if (offsets(0) != 0 || offsets(groups) != centre_count) throw std::invalid_argument("offsets: expected to cover all centres");
    for (int64_t g = 0; g < groups; ++g)
        if (begins(g + 1) < begins(g) || offsets(g + 1) <= offsets(g))
            throw std::invalid_argument("offsets: expected a centre at least for each group");
    expect("centres", centres, {centre_count, width});
    expect("nearest", nearest, {count});
    if (most < 1) throw std::invalid_argument("most: expected at least 1");
    expect_threads(threads);
    nb::gil_scoped_release release;
    cluster(points.data(), width, begins.data(), groups, offsets.data(), most, rounds, centres.data(), nearest.data(), threads);
}

void assign_tokens_adapter(Array<const float, 2> tokens, Array<const float, 2> axes, Array<const float, 2> roots,
                           Array<const float, 2> leaves, Array<const int64_t, 1> offsets, Array<uint32_t, 1> assigned, int threads) {
    const auto count = static_cast<int64_t>(tokens.shape(0)), width = static_cast<int64_t>(tokens.shape(1));
    const TokenTree tree = tree_of(axes, roots, leaves, offsets, width);
    expect("assigned", assigned, {count});
    expect_threads(threads);
    nb::gil_scoped_release release;
    assign_tokens(tokens.data(), count, width, tree, assigned.data(), threads);
}

void fill_prefix_adapter(std::vector<Items> shards, Array<const float, 2> axes, Array<uint8_t, 2> blocks, int threads,
                         std::optional<Array<const uint32_t, 1>> order) {
    const Sources given = sources_of(shards);
    const auto count = static_cast<int64_t>(axes.shape(0));
    check_prefix_width(count, given.width);
    expect("axes", axes, {count, given.width});
    expect("blocks", blocks, {prefix_blocks(given.size), prefix_block_bytes(count)});
    expect_threads(threads);
    if (!(skew(axes.data(), count, given.width) <= kSkew)) throw std::invalid_argument("axes: expected orthonormal rows");
    if (order) expect("order", *order, {given.size});
    for (int64_t at = 0; order && at < given.size; ++at)
        if ((*order)(at) >= given.size) throw std::invalid_argument("order: not a row");
    nb::gil_scoped_release release;
    fill_prefix(given.sources.data(), static_cast<int64_t>(given.sources.size()), given.tokens, given.width, axes.data(), count,
                order ? order->data() : nullptr, blocks.data(), threads);
}

}  // namespace

void define_builders(nb::module_& m) {
    m.def("encode", &encode_adapter, "items"_a.noconvert(), "codes"_a.noconvert(), "scales"_a.noconvert(), "errors"_a.noconvert(),
          "norms"_a.noconvert(), "threads"_a);
    m.def("gather_directions", &gather_directions_adapter, "shards"_a.noconvert(), "rows"_a.noconvert(), "directions"_a.noconvert(),
          "known"_a.noconvert(), "threads"_a);
    m.def("project", &project_adapter, "points"_a.noconvert(), "axes"_a.noconvert(), "along"_a.noconvert(), "threads"_a);
    m.def("mean_directions", &mean_directions_adapter, "points"_a.noconvert(), "group_of"_a.noconvert(), "directions"_a.noconvert(),
          "threads"_a);
    m.def("cluster", &cluster_adapter, "points"_a.noconvert(), "begins"_a.noconvert(), "offsets"_a.noconvert(), "most"_a, "rounds"_a,
          "centres"_a.noconvert(), "nearest"_a.noconvert(), "threads"_a);
    m.def("assign_tokens", &assign_tokens_adapter, "tokens"_a.noconvert(), "axes"_a.noconvert(), "roots"_a.noconvert(),
          "leaves"_a.noconvert(), "offsets"_a.noconvert(), "assigned"_a.noconvert(), "threads"_a);
    m.def("fill_lists", &fill_lists_adapter, "shards"_a.noconvert(), "axes"_a.noconvert(), "roots"_a.noconvert(), "leaves"_a.noconvert(),
          "offsets"_a.noconvert(), "directions"_a.noconvert(), "longest"_a.noconvert(), "widest"_a.noconvert(), "starts"_a.noconvert(),
          "rows"_a.noconvert(), "cosines"_a.noconvert(), "threads"_a);
    m.def("fill_prefix", &fill_prefix_adapter, "shards"_a.noconvert(), "axes"_a.noconvert(), "blocks"_a.noconvert(), "threads"_a,
          "order"_a.noconvert() = nb::none());
}

}  // namespace dqe::cpu
