// The sweep against plain loops, over random requests of awkward shapes, on every instruction set of this processor. Built
// and run by tests/zones/test_sanitizers.py with the address and undefined-behaviour sanitizers, and with the thread sanitizer, where
// several callers share the pool; exits 1 at a difference. Arguments: requests of each caller, callers.
//
// Coordinates are small integers, so that dot products are exact and every comparison is for equality.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <thread>
#include <vector>

#include "../lists.hpp"
#include "../prefix.hpp"
#include "../screen.hpp"
#include "../sweep.hpp"
#include "tiles_test.hpp"

namespace {

using namespace dqe::cpu;
using dqe::Policy;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Request {
    int64_t batch = any_of({1, 2, 4, 5, 17, 40, 70}), size = any_of({0, 1, 19, 111, 1031}), tokens = any_of({1, 3, 8}),
            width = any_of({1, 3, 64, 65});
    int64_t k = any_of({0, 1, 5, 200}), picks = any_of({0, 1, 7}), sample = any_of({0, size / 8}), field = any_of({1100, 40});
    Zoning zoning = static_cast<Zoning>(any_of({0, 1, 2, 3}));
    Policy policy = static_cast<Policy>(any_of({0, 1, 2}));
    bool screened = generator() % 2, listed = generator() % 2;
    int threads = static_cast<int>(any_of({1, 2, 3, 8}));  // 8: beside other callers, too, some of them help
    double lo = zoning == Zoning::rank ? 0.01 : 1.0, hi = zoning == Zoning::rank ? 0.03 : static_cast<double>(any_of({3, 9, 1000}));
    std::vector<float> queries, items, anchor;
    std::vector<int64_t> rows, offsets, excluded;
    int64_t bitmaps = any_of({0, 1, 1, 2});  // none, one for all queries, one for each
    std::vector<uint64_t> allowed;

    Request() {
        if (zoning == Zoning::rank) field = 60;
        const uint64_t rarity = static_cast<uint64_t>(any_of({1, 2, 8, 64, 5000}));
        for (int64_t w = 0; w < (bitmaps == 2 ? batch : bitmaps) * words(); ++w) {  // bits behind the last item mean nothing
            const bool inverted = rarity == 8 && w % 2;
            uint64_t word = 0;
            for (int bit = 0; bit < 64; ++bit) word |= uint64_t{generator() % rarity == 0} << bit;
            allowed.push_back(inverted ? ~word : word);
        }
        const auto fill = [](std::vector<float>& values, int64_t count) {
            for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<float>(static_cast<int64_t>(generator() % 7) - 3));
        };
        fill(queries, batch * width);
        fill(items, size * tokens * width);
        for (int64_t i = 0; i < std::min<int64_t>(size / 9, 5); ++i)
            items[generator() % items.size()] = std::vector<float>{NAN, kInfinity, -kInfinity}[generator() % 3];
        fill(anchor, batch);
        offsets.push_back(0);
        for (int64_t b = 0; b < batch; ++b) {
            rows.push_back(100 + 3 * b);
            for (int64_t i = 0; i < size; ++i)
                if (generator() % 50 == 0) excluded.push_back(i);
            offsets.push_back(static_cast<int64_t>(excluded.size()));
        }
    }

    int64_t words() const { return (size + 63) / 64; }

    bool allows(int64_t b, int64_t i) const {
        return bitmaps == 0 || (allowed[static_cast<size_t>((bitmaps == 2 ? b * words() : 0) + i / 64)] >> (i % 64) & 1);
    }

    float score(int64_t b, int64_t i) const {
        float best = -kInfinity;
        for (int64_t m = 0; m < tokens; ++m) {
            float sum = 0.0f;
            for (int64_t d = 0; d < width; ++d) sum += queries[b * width + d] * items[(i * tokens + m) * width + d];
            best = std::isnan(best) || std::isnan(sum) ? NAN : std::max(best, sum);
        }
        return best;
    }
};

struct Results {
    std::vector<float> scores, anchor, lo, hi, pick_scores;
    std::vector<int64_t> ids, counts, picks;
    std::vector<double> keys;
    std::vector<int8_t> status;

    Results(const Request& request)
        : scores(request.batch * request.k),
          anchor(request.anchor),
          lo(request.batch, static_cast<float>(request.lo)),
          hi(request.batch, static_cast<float>(request.hi)),
          pick_scores(request.batch * request.picks),
          ids(request.batch * request.k),
          counts(3 * request.batch),
          picks(request.batch * request.picks),
          keys(request.batch * request.picks),
          status(request.batch) {}
};

void require(bool holds, const char* what, const Request& request) {
    if (holds) return;
    std::printf(
        "%s differ: B=%ld N=%ld M=%ld D=%ld k=%ld P=%ld zoning=%d policy=%d screened=%d sample=%ld field=%ld threads=%d bitmaps=%ld\n",
        what, request.batch, request.size, request.tokens, request.width, request.k, request.picks, static_cast<int>(request.zoning),
        static_cast<int>(request.policy), request.screened, request.sample, request.field, request.threads, request.bitmaps);
    std::fflush(stdout);
    std::_Exit(1);  // other callers are at work
}

// Everything by definition: rank all candidates, then classify each.
void check(const Request& request, const Results& results) {
    for (int64_t b = 0; b < request.batch; ++b) {
        if (results.status[b] == static_cast<int8_t>(Status::scattered)) {
            require(request.screened && request.listed, "status", request);
            continue;
        }
        if (results.status[b] == static_cast<int8_t>(Status::misjudged)) {
            require(request.sample > 0, "status", request);
            continue;
        }
        std::vector<std::pair<float, int64_t>> ranked;
        for (int64_t i = 0; i < request.size; ++i) {
            const float score = request.score(b, i);
            const auto from = request.excluded.begin() + request.offsets[b], to = request.excluded.begin() + request.offsets[b + 1];
            if (!std::isnan(score) && request.allows(b, i) && !std::binary_search(from, to, i)) ranked.emplace_back(-score, i);
        }
        std::sort(ranked.begin(), ranked.end());
        for (int64_t r = 0; r < request.k; ++r) {
            const bool filled = r < static_cast<int64_t>(ranked.size());
            require(results.ids[b * request.k + r] == (filled ? ranked[r].second : -1), "ids", request);
            require(results.scores[b * request.k + r] == (filled ? -ranked[r].first : -kInfinity), "scores", request);
        }
        if (request.zoning == Zoning::none || results.status[b] == static_cast<int8_t>(Status::outgrown) || ranked.empty()) continue;
        const float anchor = request.zoning == Zoning::given ? request.anchor[b] : -ranked[0].first;
        float lo = static_cast<float>(request.lo), hi = static_cast<float>(request.hi);
        if (request.zoning == Zoning::rank) {
            lo = anchor + ranked[static_cast<size_t>(request.lo * static_cast<double>(ranked.size() - 1))].first;
            hi = anchor + ranked[static_cast<size_t>(request.hi * static_cast<double>(ranked.size() - 1))].first;
        }
        int64_t counts[3] = {0, 0, 0};
        std::vector<std::pair<double, int64_t>> keys;
        for (const auto& [negative, id] : ranked) {
            const float delta = anchor + negative;
            counts[0] += delta<lo, counts[2] += delta> hi;
            if (!(delta >= lo && delta <= hi)) continue;
            ++counts[1];
            keys.emplace_back(-dqe::pick_key({request.policy, 0.5, 77}, -negative, request.rows[b], id), id);
        }
        require(std::equal(counts, counts + 3, results.counts.begin() + 3 * b), "counts", request);
        std::sort(keys.begin(), keys.end());
        for (int64_t p = 0; p < request.picks; ++p)
            require(results.picks[b * request.picks + p] == (p < static_cast<int64_t>(keys.size()) ? keys[p].second : -1), "picks",
                    request);
    }
}

// Lists around the axes, of tokens that were dealt out by chance, of the first items or of all.
struct Lists {
    int64_t count, covered;
    std::vector<float> directions, scales, errors, norms, longest, widest;
    std::vector<uint8_t> codes;
    AlignedVector<uint8_t> blocks;
    std::vector<int64_t> starts;
    std::vector<uint32_t> rows;
    std::vector<uint16_t> cosines;
    TokenLists lists;

    explicit Lists(const Request& request)
        : count(any_of({1, 2, request.width})), covered(any_of({0, request.size / 2, request.size})), directions(count * request.width) {
        for (int64_t c = 0; c < count; ++c) directions[c * request.width + c % request.width] = c % 2 ? -1.0f : 1.0f;
        for (auto* numbers : {&scales, &errors, &norms, &longest, &widest}) numbers->resize(count);
        codes.resize(count * code_width(request.width));
        encode_rows(directions.data(), count, request.width, codes.data(), scales.data(), errors.data(), norms.data());
        starts.resize(count + 1);
        // The tree looks at all coordinates, or at one that says little of where a token belongs.
        const int64_t axis_count = any_of({1, request.width});
        const std::vector<int64_t> offsets = {0, count};
        std::vector<float> axes(axis_count * request.width), roots(axis_count), leaves(count * axis_count);
        for (int64_t d = 0; d < axis_count; ++d) axes[d * request.width + d] = 1.0f;
        for (int64_t c = 0; c < count; ++c) std::copy_n(&directions[c * request.width], axis_count, &leaves[c * axis_count]);
        const TokenTree tree = {axis_count, 1, axes.data(), roots.data(), leaves.data(), offsets.data()};
        rows.resize(covered * request.tokens), cosines.resize(rows.size());
        const TokenSource source = {request.items.data(), covered, false};
        fill_lists(&source, 1, request.tokens, request.width, tree, directions.data(), longest.data(), widest.data(), starts.data(),
                   rows.data(), cosines.data(), request.threads);
        blocks = codes_in_blocks(codes.data(), count, code_width(request.width));
        const CodedRows coded = {blocks.data(), scales.data(), errors.data(), norms.data(), count, code_width(request.width)};
        lists = {count, covered, coded, longest.data(), widest.data(), starts.data(), rows.data(), cosines.data()};
    }
};

// Prefixes in the basis that the vectors have, turned in one plane or not, of the first items or of all, or in the order of lists; none for
// short vectors.
struct Prefixes {
    int64_t covered, width;
    std::vector<float> axes;
    std::vector<uint8_t> blocks;
    Prefix prefix;

    Prefixes(const Request& request, const TokenLists* lists)
        : covered(lists ? lists->covered : any_of({0, request.size / 2, request.size})),
          width(request.width < 64 ? 0 : any_of({16, 32, 64})) {
        if (width == 0) return;
        axes.resize(width * request.width);
        for (int64_t p = 0; p < width; ++p) axes[p * request.width + p] = 1.0f;
        const bool turned = generator() % 2;
        if (turned) axes[0] = 0.6f, axes[1] = 0.8f, axes[request.width] = -0.8f, axes[request.width + 1] = 0.6f;
        blocks.resize(prefix_blocks(covered * request.tokens) * prefix_block_bytes(width));
        const TokenSource source = {request.items.data(), covered, false};
        fill_prefix(&source, 1, request.tokens, request.width, axes.data(), width, lists ? lists->rows : nullptr, blocks.data(),
                    request.threads);
        prefix = {covered, width, axes.data(), blocks.data()};
    }
};

void run_once(const TileKernels* kernels) {
    Request request;
    if (request.batch > kernels->max_row_queries && !kernels->find_bounded) request.screened = false;
    const int64_t rows = request.size * request.tokens, first = request.size / 3;
    std::vector<uint8_t> codes(rows * code_width(request.width));
    std::vector<float> scales(rows), errors(rows), norms(rows);
    encode_rows(request.items.data(), rows, request.width, codes.data(), scales.data(), errors.data(), norms.data());
    const auto shard = [&](int64_t from, int64_t to) -> Shard {
        const int64_t at = from * request.tokens;
        return {request.items.data() + at * request.width,
                to - from,
                codes.data() + at * code_width(request.width),
                scales.data() + at,
                errors.data() + at,
                norms.data() + at};
    };
    const Shard shards[] = {shard(0, first), shard(first, first), shard(first, request.size)};
    Gallery gallery = {shards, 3, request.size, request.tokens, request.width, false, request.screened};
    Lists lists(request);
    if (request.screened && request.listed && request.zoning != Zoning::rank) gallery.lists = &lists.lists;
    const Prefixes prefixes(request, gallery.lists);
    if (request.screened && prefixes.width && generator() % 4) gallery.prefix = &prefixes.prefix;
    Results results(request);
    Sweep sweep = {
        .queries = request.queries.data(),
        .query_rows = request.rows.data(),
        .batch = request.batch,
        .gallery = gallery,
        .allowed = {.words = request.bitmaps ? request.allowed.data() : nullptr, .stride = request.bitmaps == 2 ? request.words() : 0},
        .excluded = {.offsets = request.offsets.data(), .ids = request.excluded.data()},
        .k = request.k,
        .picks = request.picks,
        .zoning = request.zoning,
        .anchor_is_best = request.zoning != Zoning::given,
        .anchor_ids = nullptr,
        .lo = request.lo,
        .hi = request.hi,
        .rule = {.policy = request.policy, .temperature = 0.5, .seed = 77},
        .sample = request.sample,
        .field = request.field,
        .by_rows = gallery.lists || request.batch <= kernels->max_row_queries,
        .most_listed = any_of({1, int64_t{1} << 40}),
        .threads = request.threads,
        .kernels = kernels};
    run(sweep, {results.scores.data(), results.ids.data(), results.anchor.data(), results.lo.data(), results.hi.data(),
                results.counts.data(), results.keys.data(), results.picks.data(), results.pick_scores.data(), results.status.data()});
    check(request, results);
    const auto misjudged = static_cast<int8_t>(Status::misjudged);
    if (gallery.lists) return;
    if (std::find(results.status.begin(), results.status.end(), misjudged) == results.status.end()) return;
    request.sample = sweep.sample = 0;  // the second try, which must settle them
    Results again(request);
    run(sweep, {again.scores.data(), again.ids.data(), again.anchor.data(), again.lo.data(), again.hi.data(), again.counts.data(),
                again.keys.data(), again.picks.data(), again.pick_scores.data(), again.status.data()});
    check(request, again);
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 300, callers = count > 2 ? std::atoi(arguments[2]) : 1;
    const auto call = [&](int seed) {
        generator.seed(static_cast<uint64_t>(seed));
        for (const TileKernels* const* kernels = available_tile_kernels(); *kernels; ++kernels) {
            for (int round = 0; round < rounds; ++round) {
                run_once(*kernels);
                check_nearest(*kernels);
                check_prefix_codes(*kernels);
                check_products_of_codes(*kernels);
                check_prefixed(*kernels);
            }
            std::printf("%s: %d requests\n", (*kernels)->name, rounds);
        }
    };
    std::vector<std::thread> others;
    for (int c = 1; c < callers; ++c) others.emplace_back(call, 1 + c);
    call(1);
    for (std::thread& other : others) other.join();
    return 0;
}
