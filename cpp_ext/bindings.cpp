// dqe_engine._kernels: shapes and sizes are checked here, dtypes, contiguity and writability by nanobind (.noconvert(): what
// does not fit is a TypeError, never a copy). The GIL is released while a kernel runs.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "parallel.hpp"
#include "screen.hpp"
#include "sweep.hpp"

using namespace dqe::cpu;
using namespace nb::literals;

namespace {

const TileKernels* kernels_of(const std::string& name) {
    const TileKernels* const* available = available_tile_kernels();
    if (name.empty()) return *available;
    for (; *available; ++available)
        if ((*available)->name == name) return *available;
    throw std::invalid_argument("instruction set '" + name + "' is not one that this processor runs");
}

// The quantised copy of one shard (screen.hpp): codes (n, M, W) and three numbers per token (n, M).
struct CodedShard {
    Array<const uint8_t, 3> codes;
    Array<const float, 2> scales, errors, norms;
};

// Of all shards of a gallery. This and the next two are made once for many sweeps: to look at twenty arrays takes 10 microseconds.
struct CodeArrays {
    std::vector<CodedShard> shards;
};

struct Arguments {
    std::vector<Items> shards;
    const CodeArrays* coded;
    Array<const int64_t, 1> offsets, excluded;
    std::optional<Array<const int64_t, 1>> anchor_ids;
};

Gallery gallery_of(const Arguments& given, std::vector<Shard>& shards) {
    Gallery gallery = {};
    if (given.shards.empty()) throw std::invalid_argument("shards: expected at least one");
    const Items& first = given.shards.front();
    gallery.tokens = static_cast<int64_t>(first.shape(1));
    gallery.width = static_cast<int64_t>(first.shape(2));
    gallery.half = is_half(first);
    gallery.screened = given.coded != nullptr;
    if (gallery.screened && gallery.width > kMostCodedWidth) throw std::invalid_argument("coded: tokens too wide for 32-bit sums");
    if (gallery.tokens == 0 || gallery.width == 0) throw std::invalid_argument("items: expected at least one token of at least one number");
    if (gallery.screened && given.coded->shards.size() != given.shards.size())
        throw std::invalid_argument("coded: expected one entry a shard");
    for (size_t s = 0; s < given.shards.size(); ++s) {
        const Items& items = given.shards[s];
        const auto count = static_cast<int64_t>(items.shape(0));
        expect("items", items, {count, gallery.tokens, gallery.width});
        if (is_half(items) != gallery.half) throw nb::type_error("items: all shards must have one dtype");
        Shard shard = {items.data(), count, nullptr, nullptr, nullptr, nullptr};
        if (gallery.screened) {
            const CodedShard& coded = given.coded->shards[s];
            expect("codes", coded.codes, {count, gallery.tokens, code_width(gallery.width)});
            expect("scales", coded.scales, {count, gallery.tokens});
            expect("errors", coded.errors, {count, gallery.tokens});
            expect("norms", coded.norms, {count, gallery.tokens});
            shard.codes = coded.codes.data();
            shard.scales = coded.scales.data(), shard.errors = coded.errors.data(), shard.norms = coded.norms.data();
        }
        shards.push_back(shard);
        gallery.size += count;
    }
    if (gallery.size >= 0xFFFFFFFF) throw std::invalid_argument("items: expected fewer than 2^32 - 1");
    gallery.shards = shards.data();
    gallery.shard_count = static_cast<int64_t>(shards.size());
    return gallery;
}

void check_exclusions(const Arguments& given, int64_t batch, int64_t size) {
    expect("offsets", given.offsets, {batch + 1});
    int64_t last = 0;
    for (int64_t b = 0; b <= batch; last = given.offsets(b++))
        if (given.offsets(b) < last || given.offsets(b) > static_cast<int64_t>(given.excluded.shape(0)))
            throw std::invalid_argument("offsets: expected ascending positions in excluded");
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t at = given.offsets(b); at < given.offsets(b + 1); ++at)
            if (given.excluded(at) < 0 || given.excluded(at) >= size ||
                (at > given.offsets(b) && given.excluded(at) <= given.excluded(at - 1)))
                throw std::invalid_argument("excluded: expected ascending distinct positions in each row");
}

CodedShard coded_shard(const nb::tuple& arrays) {
    if (arrays.size() != 4) throw nb::type_error("coded: expected (codes, scales, errors, norms) for each shard");
    CodedShard shard;
    if (!nb::try_cast(arrays[0], shard.codes, false) || !nb::try_cast(arrays[1], shard.scales, false) ||
        !nb::try_cast(arrays[2], shard.errors, false) || !nb::try_cast(arrays[3], shard.norms, false))
        throw nb::type_error("coded: expected contiguous uint8 (n, M, W) and three float32 (n, M) arrays");
    return shard;
}

CodeArrays codes_of(const std::vector<nb::tuple>& shards) {
    CodeArrays codes;
    for (const nb::tuple& arrays : shards) codes.shards.push_back(coded_shard(arrays));
    return codes;
}

// What fill_lists makes, and the coded directions (L, W).
struct ListArrays {
    int64_t covered;  // items
    int64_t code_width;
    AlignedVector<uint8_t> blocks;  // of codes
    Array<const float, 1> scales, errors, norms, longest, widest;
    Array<const int64_t, 1> starts;
    Array<const uint32_t, 1> rows;
    Array<const uint16_t, 1> cosines;
};

// What fill_prefix makes.
struct PrefixArrays {
    int64_t covered;  // items
    Array<const float, 2> axes;
    Array<const uint8_t, 2> blocks;
};

PrefixArrays prefix_arrays(int64_t covered, Array<const float, 2> axes, Array<const uint8_t, 2> blocks) {
    const auto width = static_cast<int64_t>(axes.shape(0));
    check_prefix_width(width, static_cast<int64_t>(axes.shape(1)));
    expect("blocks", blocks, {static_cast<int64_t>(blocks.shape(0)), prefix_block_bytes(width)});
    return {covered, std::move(axes), std::move(blocks)};
}

// Checks sizes; that the blocks are those of the gallery is the caller's word.
Prefix prefix_of(const PrefixArrays& arrays, const Gallery& gallery) {
    const auto width = static_cast<int64_t>(arrays.axes.shape(0));
    if (!gallery.screened || arrays.covered < 0 || arrays.covered > gallery.size)
        throw std::invalid_argument("prefix: not of this gallery, or of one that is not coded");
    expect("prefix", arrays.axes, {width, gallery.width});
    expect("prefix", arrays.blocks, {prefix_blocks(arrays.covered * gallery.tokens), prefix_block_bytes(width)});
    return {arrays.covered, width, arrays.axes.data(), arrays.blocks.data()};
}

ListArrays lists_of(int64_t covered, Array<const uint8_t, 2> codes, Array<const float, 1> scales, Array<const float, 1> errors,
                    Array<const float, 1> norms, Array<const float, 1> longest, Array<const float, 1> widest,
                    Array<const int64_t, 1> starts, Array<const uint32_t, 1> rows, Array<const uint16_t, 1> cosines) {
    const auto count = static_cast<int64_t>(longest.shape(0)), size = static_cast<int64_t>(rows.shape(0));
    if (count == 0 || covered < 0) throw std::invalid_argument("lists: expected at least one");
    for (const auto* numbers : {&scales, &errors, &norms, &widest}) expect("lists", *numbers, {count});
    if (static_cast<int64_t>(codes.shape(0)) != count) throw std::invalid_argument("lists: expected codes of each");
    expect("lists", starts, {count + 1});
    expect("lists", cosines, {size});
    for (int64_t c = 0; c <= count; ++c)
        if (starts(c) < (c ? starts(c - 1) : 0)) throw std::invalid_argument("lists: starts must ascend");
    if (starts(count) != size) throw std::invalid_argument("lists: must hold every token once");
    const auto width = static_cast<int64_t>(codes.shape(1));
    if (width % kCodeAlignment) throw std::invalid_argument("lists: expected codes of whole lines");
    return {covered, width, codes_in_blocks(codes.data(), count, width), scales, errors, norms, longest, widest, starts, rows, cosines};
}

// Checks what memory is reached by; that the rows are those of the gallery is the caller's word.
TokenLists token_lists(const ListArrays& lists, const Gallery& gallery) {
    const auto count = static_cast<int64_t>(lists.longest.shape(0)), size = lists.covered * gallery.tokens;
    if (lists.covered > gallery.size) throw std::invalid_argument("lists: not of this gallery");
    if (lists.code_width != code_width(gallery.width)) throw std::invalid_argument("lists: of tokens of another width");
    expect("lists", lists.rows, {size});
    const CodedRows directions = {lists.blocks.data(), lists.scales.data(), lists.errors.data(), lists.norms.data(), count,
                                  lists.code_width};
    return {count,
            lists.covered,
            directions,
            lists.longest.data(),
            lists.widest.data(),
            lists.starts.data(),
            lists.rows.data(),
            lists.cosines.data()};
}

int64_t sweep_adapter(Array<const float, 2> queries, std::vector<Items> shards, const CodeArrays* coded, Array<const int64_t, 1> offsets,
                      Array<const int64_t, 1> excluded, std::optional<Array<const uint64_t, 2>> allowed, Array<const int64_t, 1> query_rows,
                      int zoning, bool anchor_is_best, std::optional<Array<const int64_t, 1>> anchor_ids, double lo_of_all,
                      double hi_of_all, int policy, double temperature, uint64_t seed, int64_t sample, int64_t field, bool by_rows,
                      Array<float, 2> scores, Array<int64_t, 2> ids, Array<float, 1> anchor, Array<float, 1> lo, Array<float, 1> hi,
                      Array<int64_t, 2> counts, Array<double, 2> pick_keys, Array<int64_t, 2> picks, Array<float, 2> pick_scores,
                      Array<int8_t, 1> status, int threads, const std::string& instruction_set, const ListArrays* listed,
                      int64_t most_listed, const PrefixArrays* prefix) {
    const Arguments given = {std::move(shards), coded, offsets, excluded, anchor_ids};
    std::vector<Shard> storage;
    expect_threads(threads);
    Gallery gallery = gallery_of(given, storage);
    if (listed && !(gallery.screened && by_rows)) throw std::invalid_argument("lists: only by rows, of coded items");
    const TokenLists found_lists = listed ? token_lists(*listed, gallery) : TokenLists{};
    if (listed) gallery.lists = &found_lists;
    const Prefix prefixes = prefix ? prefix_of(*prefix, gallery) : Prefix{};
    if (prefix) gallery.prefix = &prefixes;
    if (listed && prefix && prefix->covered != listed->covered) throw std::invalid_argument("prefix: not of the lists' items");
    const auto batch = static_cast<int64_t>(queries.shape(0)), k = static_cast<int64_t>(scores.shape(1)),
               p = static_cast<int64_t>(picks.shape(1));
    expect("queries", queries, {batch, gallery.width});
    expect("query_rows", query_rows, {batch});
    check_exclusions(given, batch, gallery.size);
    Bitmap bitmap = {nullptr, 0};
    if (allowed) {
        const bool shared = allowed->shape(0) == 1;
        expect("allowed", *allowed, {shared ? 1 : batch, (gallery.size + 63) / 64});
        bitmap = {allowed->data(), shared ? 0 : static_cast<int64_t>(allowed->shape(1))};
    }
    const int64_t candidates = zoning == 3 ? Allowed(bitmap, batch, gallery.size).most() : 0;
    expect("scores", scores, {batch, k});
    expect("ids", ids, {batch, k});
    for (const auto& [name, array] : {std::pair{"anchor", &anchor}, {"lo", &lo}, {"hi", &hi}}) expect(name, *array, {batch});
    expect("counts", counts, {batch, 3});
    expect("pick_keys", pick_keys, {batch, p});
    expect("picks", picks, {batch, p});
    expect("pick_scores", pick_scores, {batch, p});
    expect("status", status, {batch});
    if (policy < 0 || policy > 2) throw std::invalid_argument("policy: expected 0, 1 or 2");
    if (zoning < 0 || zoning > 3) throw std::invalid_argument("zoning: expected 0 to 3");
    if (zoning == 3 && !(0 <= lo_of_all && lo_of_all <= hi_of_all && hi_of_all <= 1))
        throw std::invalid_argument("expected 0 <= lo <= hi <= 1");
    if (zoning >= 2 && field <= static_cast<int64_t>((zoning == 3 ? hi_of_all : 0.0) * static_cast<double>(candidates)))
        throw std::invalid_argument("field: too small for the rank of hi");
    if (anchor_ids) {
        expect("anchor_ids", *anchor_ids, {batch});
        for (int64_t b = 0; b < batch; ++b)
            if ((*anchor_ids)(b) < 0 || (*anchor_ids)(b) >= gallery.size) throw std::invalid_argument("anchor_ids: not a position");
    }
    const TileKernels* kernels = kernels_of(instruction_set);
    if (gallery.screened && !by_rows && !kernels->find_bounded)
        throw std::invalid_argument("coded: not in panels with this instruction set");
    if (by_rows && !listed && batch > kernels->max_row_queries) throw std::invalid_argument("by_rows: too many queries");
    const Sweep sweep = {.queries = queries.data(),
                         .query_rows = query_rows.data(),
                         .batch = batch,
                         .gallery = gallery,
                         .allowed = bitmap,
                         .excluded = {.offsets = offsets.data(), .ids = excluded.data()},
                         .k = k,
                         .picks = p,
                         .zoning = static_cast<Zoning>(zoning),
                         .anchor_is_best = anchor_is_best,
                         .anchor_ids = anchor_ids ? anchor_ids->data() : nullptr,
                         .lo = lo_of_all,
                         .hi = hi_of_all,
                         .rule = {.policy = static_cast<dqe::Policy>(policy), .temperature = temperature, .seed = seed},
                         .sample = sample,
                         .field = field,
                         .by_rows = by_rows,
                         .most_listed = most_listed,
                         .threads = threads,
                         .kernels = kernels};
    const Outcome out = {.top_scores = scores.data(),
                         .top_ids = ids.data(),
                         .anchor = anchor.data(),
                         .lo = lo.data(),
                         .hi = hi.data(),
                         .counts = counts.data(),
                         .pick_keys = pick_keys.data(),
                         .picks = picks.data(),
                         .pick_scores = pick_scores.data(),
                         .status = status.data()};
    nb::gil_scoped_release release;
    return run(sweep, out);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const TileKernels* const* kernels = available_tile_kernels(); *kernels; ++kernels) names.emplace_back((*kernels)->name);
    return names;
}

// Multiply-adds per second that `threads` threads reach in a loop that never leaves their registers.
double multiply_add_rate(int threads, const std::string& instruction_set) {
    expect_threads(threads);
    const TileKernels* kernels = kernels_of(instruction_set);
    nb::gil_scoped_release release;
    constexpr int64_t kSteps = 4'000'000;
    std::vector<int64_t> done(static_cast<size_t>(threads));
    const auto start = std::chrono::steady_clock::now();
    for_each_part(threads, threads, [&](int, int64_t part) {
        float sink[2] = {1.0f, 0.5f};
        done[static_cast<size_t>(part)] = kernels->multiply_add_loop(kSteps, sink);
        volatile float kept = sink[0];
        static_cast<void>(kept);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    int64_t all = 0;
    for (const int64_t own : done) all += own;
    return static_cast<double>(all) / seconds.count();
}

}  // namespace

NB_MODULE(_kernels, m) {
    nb::set_leak_warnings(false);  // a screen may well live as long as the process
    m.doc() = "Compiled kernels of dqe_engine; called through dqe_engine.zones.";
    m.attr("MAX_ROW_QUERIES") = (*available_tile_kernels())->max_row_queries;
    nb::class_<CodeArrays>(m, "Codes").def(nb::new_(&codes_of), "shards"_a);
    nb::class_<ListArrays>(m, "Lists")
        .def(nb::new_(&lists_of), "covered"_a, "codes"_a.noconvert(), "scales"_a.noconvert(), "errors"_a.noconvert(), "norms"_a.noconvert(),
             "longest"_a.noconvert(), "widest"_a.noconvert(), "starts"_a.noconvert(), "rows"_a.noconvert(), "cosines"_a.noconvert());
    nb::class_<PrefixArrays>(m, "Prefixes").def(nb::new_(&prefix_arrays), "covered"_a, "axes"_a.noconvert(), "blocks"_a.noconvert());
    m.def("sweep", &sweep_adapter, "queries"_a.noconvert(), "shards"_a.noconvert(), "coded"_a.none(), "offsets"_a.noconvert(),
          "excluded"_a.noconvert(), "allowed"_a.noconvert().none(), nb::kw_only(), "query_rows"_a.noconvert(), "zoning"_a,
          "anchor_is_best"_a, "anchor_ids"_a.noconvert().none(), "lo_of_all"_a, "hi_of_all"_a, "policy"_a, "temperature"_a, "seed"_a,
          "sample"_a, "field"_a, "by_rows"_a, "scores"_a.noconvert(), "ids"_a.noconvert(), "anchor"_a.noconvert(), "lo"_a.noconvert(),
          "hi"_a.noconvert(), "counts"_a.noconvert(), "pick_keys"_a.noconvert(), "picks"_a.noconvert(), "pick_scores"_a.noconvert(),
          "status"_a.noconvert(), "threads"_a, "instruction_set"_a, "lists"_a.none() = nb::none(), "most_listed"_a = 0,
          "prefix"_a.none() = nb::none());
    define_builders(m);
    m.def("instruction_sets", &instruction_sets, "The instruction sets that this processor runs, best first.");
    m.def(
        "screened_queries", [](const std::string& name) { return kernels_of(name)->screened_queries; }, "instruction_set"_a,
        "Up to how many queries screening gains.");
    m.def("multiply_add_rate", &multiply_add_rate, "threads"_a, "instruction_set"_a = "",
          "Multiply-adds per second of a loop that stays in registers.");
}
