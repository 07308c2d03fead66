// dqe_engine._kernels: shapes and sizes are checked here, dtypes, contiguity and writability by nanobind (.noconvert(): what
// does not fit is a TypeError, never a copy). The GIL is released while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "zones_cpu.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace dqe::cpu;

namespace {

template <typename T, int Rank>
using Array = nb::ndarray<T, nb::ndim<Rank>, nb::device::cpu, nb::c_contig>;
using Scores = Array<const float, 2>;

// Raises ValueError unless `array` is (rows,) or (rows, columns).
template <typename AnyArray>
void expect(const char* name, const AnyArray& array, size_t rows, size_t columns = 0) {
    if (array.shape(0) == rows && (array.ndim() == 1 || array.shape(1) == columns)) return;
    const auto text = [](size_t height, size_t width, bool matrix) {
        return "(" + std::to_string(height) + (matrix ? ", " + std::to_string(width) + ")" : ",)");
    };
    const bool matrix = array.ndim() == 2;
    throw std::invalid_argument(std::string(name) + ": expected shape " + text(rows, columns, matrix) + ", got " +
                                text(array.shape(0), matrix ? array.shape(1) : 0, matrix));
}

ScoreTile tile_of(const Scores& scores, int64_t first_item) {
    return {scores.data(), static_cast<int64_t>(scores.shape(0)), static_cast<int64_t>(scores.shape(1)), first_item};
}

TopK top_k_of(const Array<float, 2>& scores, const Array<int64_t, 2>& ids) {
    expect("ids", ids, scores.shape(0), scores.shape(1));
    return {scores.data(), ids.data(), static_cast<int64_t>(scores.shape(1))};
}

void update_top_k_adapter(Scores tile, int64_t first_item, Array<float, 2> scores, Array<int64_t, 2> ids, int threads) {
    expect("scores", scores, tile.shape(0), scores.shape(1));
    const TopK state = top_k_of(scores, ids);
    nb::gil_scoped_release release;
    update_top_k(tile_of(tile, first_item), state, threads);
}

void sort_top_k_adapter(Array<float, 2> scores, Array<int64_t, 2> ids, int threads) {
    const TopK state = top_k_of(scores, ids);
    nb::gil_scoped_release release;
    sort_top_k(state, static_cast<int64_t>(scores.shape(0)), threads);
}

void update_zones_adapter(Scores tile, int64_t first_item, int64_t first_query, Array<const float, 1> anchor, Array<const float, 1> lo,
                          Array<const float, 1> hi, int policy, double temperature, uint64_t seed, Array<int64_t, 2> counts,
                          Array<double, 2> pick_keys, Array<int64_t, 2> pick_ids, Array<float, 2> pick_scores, int threads) {
    const size_t queries = tile.shape(0), picks = pick_keys.shape(1);
    expect("anchor", anchor, queries);
    expect("lo", lo, queries);
    expect("hi", hi, queries);
    expect("counts", counts, queries, 3);
    expect("pick_keys", pick_keys, queries, picks);
    expect("pick_ids", pick_ids, queries, picks);
    expect("pick_scores", pick_scores, queries, picks);
    if (policy < 0 || policy > 2) throw std::invalid_argument("policy: expected 0, 1 or 2, got " + std::to_string(policy));
    const Zones state = {anchor.data(),    lo.data(),       hi.data(),          counts.data(),
                         pick_keys.data(), pick_ids.data(), pick_scores.data(), static_cast<int64_t>(picks),
                         first_query};
    nb::gil_scoped_release release;
    update_zones(tile_of(tile, first_item), {static_cast<dqe::Policy>(policy), temperature, seed}, state, threads);
}

void sort_picks_adapter(Array<double, 2> keys, Array<int64_t, 2> ids, Array<float, 2> scores, int threads) {
    expect("ids", ids, keys.shape(0), keys.shape(1));
    expect("scores", scores, keys.shape(0), keys.shape(1));
    Zones state = {};
    state.pick_keys = keys.data(), state.pick_ids = ids.data(), state.pick_scores = scores.data();
    state.picks = static_cast<int64_t>(keys.shape(1));
    nb::gil_scoped_release release;
    sort_picks(state, static_cast<int64_t>(keys.shape(0)), threads);
}

Ranking ranking_of(const Array<float, 2>& buffer, const Array<int64_t, 1>& fill, const Array<float, 1>& threshold,
                   const Array<int64_t, 1>& valid) {
    const size_t queries = buffer.shape(0), width = buffer.shape(1);
    if (width == 0 || width % 2) throw std::invalid_argument("buffer: width must be twice the capacity, got " + std::to_string(width));
    expect("fill", fill, queries);
    expect("threshold", threshold, queries);
    expect("valid", valid, queries);
    return {buffer.data(), fill.data(), threshold.data(), valid.data(), static_cast<int64_t>(width / 2)};
}

void update_ranking_adapter(Scores tile, Array<float, 2> buffer, Array<int64_t, 1> fill, Array<float, 1> threshold, Array<int64_t, 1> valid,
                            int threads) {
    expect("buffer", buffer, tile.shape(0), buffer.shape(1));
    const Ranking state = ranking_of(buffer, fill, threshold, valid);
    nb::gil_scoped_release release;
    update_ranking(tile_of(tile, 0), state, threads);
}

void score_at_rank_adapter(Array<float, 2> buffer, Array<int64_t, 1> fill, Array<float, 1> threshold, Array<int64_t, 1> valid,
                           double quantile, Array<float, 1> scores, int threads) {
    const Ranking state = ranking_of(buffer, fill, threshold, valid);
    expect("scores", scores, buffer.shape(0));
    for (size_t b = 0; b < buffer.shape(0); ++b) {
        const bool held = fill(b) <= 2 * state.capacity && fill(b) >= (valid(b) < state.capacity ? valid(b) : state.capacity);
        const double rank = quantile * static_cast<double>(valid(b) - 1);
        if (!held || !(quantile >= 0) || rank >= static_cast<double>(state.capacity))
            throw std::invalid_argument("score_at_rank: row " + std::to_string(b) + " holds no score at quantile " +
                                        std::to_string(quantile));
    }
    nb::gil_scoped_release release;
    score_at_rank(state, static_cast<int64_t>(buffer.shape(0)), quantile, scores.data(), threads);
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "Compiled kernels of dqe_engine; called through dqe_engine.zones.";
    m.def("update_top_k", &update_top_k_adapter, "tile"_a.noconvert(), "first_item"_a, "scores"_a.noconvert(), "ids"_a.noconvert(),
          "threads"_a = 0);
    m.def("sort_top_k", &sort_top_k_adapter, "scores"_a.noconvert(), "ids"_a.noconvert(), "threads"_a = 0);
    m.def("update_zones", &update_zones_adapter, "tile"_a.noconvert(), "first_item"_a, "first_query"_a, "anchor"_a.noconvert(),
          "lo"_a.noconvert(), "hi"_a.noconvert(), "policy"_a, "temperature"_a, "seed"_a, "counts"_a.noconvert(), "pick_keys"_a.noconvert(),
          "pick_ids"_a.noconvert(), "pick_scores"_a.noconvert(), "threads"_a = 0);
    m.def("sort_picks", &sort_picks_adapter, "keys"_a.noconvert(), "ids"_a.noconvert(), "scores"_a.noconvert(), "threads"_a = 0);
    m.def("update_ranking", &update_ranking_adapter, "tile"_a.noconvert(), "buffer"_a.noconvert(), "fill"_a.noconvert(),
          "threshold"_a.noconvert(), "valid"_a.noconvert(), "threads"_a = 0);
    m.def("score_at_rank", &score_at_rank_adapter, "buffer"_a.noconvert(), "fill"_a.noconvert(), "threshold"_a.noconvert(),
          "valid"_a.noconvert(), "quantile"_a, "scores"_a.noconvert(), "threads"_a = 0);
}
