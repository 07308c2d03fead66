// Launchers: the plan of a selection, and the passes that carry it out.
//
// Top-k and picks are lists of candidates with a limit that certifies them. A ladder of passes over ever larger subsets of the
// items (evenly spread tiles) raises the limit, since the k-th best of any subset bounds the k-th best of all from below; then
// one pass over all items appends what reaches the limit. Each rung lets through less than half of what a list holds, or little
// more where the lowest rung is a sample: the best of each few columns, which is often all of the ladder. If a list
// overflows all the same (an unlucky order of the items), the k-th best of the entries that it did store is a better limit, and
// the pass is repeated: limits are pairs (key, id) and no two entries are equal, so each round leaves at least capacity - k fewer
// to pass, and with all items equal the ids decide.
//
// Zones from a given anchor and distances are sieved in that same pass. Where they need another look at the scores (the anchor is the
// query's own best, the bounds are ranks, or items are excluded), the pass keeps the scores if they fit and that pays (see Plan), and what
// follows reads these; if not, it passes over the items again: once for the zones, three times for a histogram of ranks. Ranks among kept
// scores are bracketed by a sample of these (brackets.hpp).
#include "zones.hpp"

#include "passes.hpp"

namespace dqe::cuda {

namespace {

class Runner : Passes {
  public:
    Runner(const Request& request, const Result& result, const Plan& plan, const Workspace& space, cudaStream_t stream, const Flags& flags,
           bool waits)
        : Passes(request, plan, space, stream, flags, waits), out_(result) {}

    using Passes::hopper;
    int rows() const { return rows_; }

    Status run() {
        for (int64_t first = 0; first < r_.batch && good(); first += plan_.block) run_block(first, std::min(plan_.block, r_.batch - first));
        if (!good()) cudaStreamSynchronize(stream_);  // what was started may still write to memory that is lent
        return status_;
    }

  private:
    // What a block of queries selects, and where it goes.
    struct Block {
        int64_t first, batch;
        Selection selection;
        Finished top, picks;
    };

    void run_block(int64_t first, int64_t batch) {
        const Scan scan = scan_of(first, batch);
        const bool listed = plan_.list_top, screened = plan_.screens && screen_suits(coded_scan(scan));
        if (screened) lower(kTopOverflowed), lower(kScreenFailed), lower(kRescored);
        begin(first, batch, listed ? w_.top : Candidates{}, listed ? ladder(scan, true).sampled * sample_slots() : 0, screened);
        is_reset_ = listed;
        Block block = {};
        block.first = first, block.batch = batch;
        Selection& selection = block.selection;
        selection.top = w_.top, selection.picks = w_.picks;
        selection.rule = r_.rule;
        selection.first_query = r_.first_query + first;
        selection.want_top = plan_.list_top;
        block.top = {out_.scores + (r_.k ? first * r_.k : 0), out_.ids + (r_.k ? first * r_.k : 0), r_.k, w_.best};
        if (screened) return list_screened(scan, selection, block);
        if (r_.screened) status_.rescored = -1;
        if (!r_.zones) return list(scan, selection, block);
        selection.anchor = out_.anchor + first, selection.lo = out_.lo + first, selection.hi = out_.hi + first;
        if (r_.counts) selection.counts = out_.counts + first * 3;
        block.picks = {out_.pick_scores + (r_.picks ? first * r_.picks : 0), out_.picks + (r_.picks ? first * r_.picks : 0), r_.picks,
                       nullptr};
        if (plan_.keeps) return run_kept(scan, block);

        if (plan_.own_best) {
            list(scan, selection, block);
            selection.want_top = false;
        } else if (r_.anchor == Anchor::id) {
            if (r_.size == 0) status_.fault = Fault::anchor_outside;
            lower(kAnchorOutside);
            score_anchors(scan, r_.anchor_ids + first, out_.anchor + first);
        }
        if (r_.ranks) rank(batch, [&](const Ranks& ranks) { scan_with<Histogram>(scan, ranks); });
        bound(block, {}, nullptr);
        selection.want_picks = plan_.list_picks;
        selection.want_counts = r_.counts;
        list(scan, selection, block);
    }

    // Top-k from the codes, and from scores of what their bounds do not decide. Where bounds leave too much, or a query has none, the items
    // are passed over after all.
    void list_screened(const Scan& scan, const Selection& selection, const Block& block) {
        const int64_t query_tiles = quotient_up(block.batch, rows_);
        Pairs pairs = w_.pairs;
        Columns columns = w_.columns;
        pairs.capacity /= query_tiles, columns.capacity /= query_tiles;
        climb(scan, selection, block);
        screen(coded_scan(scan), Screening{r_.coded, w_.coded, selection.top, pairs});
        finish(scan, selection, block, false);
        rescore(scan, pairs, columns, selection.top);
        finish(scan, selection, block, true);
        synchronize();
        const bool failed = raised(kScreenFailed) || raised(kTopOverflowed);
        if (failed) list(scan, selection, block);
        if (failed || status_.rescored < 0)
            status_.rescored = -1;
        else if (waits_)
            status_.rescored += *flags_.word(kRescored);
    }

    // One pass over the items, and the host waits once, unless a list overflows or a rank lies outside its bracket. Only then are zones
    // made again: the best, or a bound, was not known.
    void run_kept(const Scan& scan, const Block& block) {
        Selection top = block.selection;
        lower(kTopOverflowed), lower(kPicksOverflowed), lower(kAnchorOutside), lower(kRanksMissed);
        if (top.want_top) climb(scan, top, block);
        keep(scan, w_.kept, top);
        finish(scan, top, block, true);
        hide(scan, block);
        find_zones(scan, block, true);
        synchronize();
        if (raised(kAnchorOutside)) status_.fault = Fault::anchor_outside;
        const bool missed = raised(kRanksMissed), overflowed = raised(kTopOverflowed);
        if (overflowed) {
            for (bool again = true; again; synchronize(), again = raised(kTopOverflowed)) {
                offer(scan, top);
                lower(kTopOverflowed);
                finish(scan, top, block, true);
            }
        }
        if (missed || (overflowed && plan_.own_best)) {
            lower(kPicksOverflowed);
            find_zones(scan, block, !missed);
            synchronize();
        }
        Selection picks = block.selection;
        picks.want_top = false, picks.want_picks = plan_.list_picks;
        while (raised(kPicksOverflowed)) {
            offer_kept(scan, picks, r_.size);
            lower(kPicksOverflowed);
            finish(scan, picks, block, true);
            synchronize();
        }
    }

    // The anchors' scores, and then none of what is excluded: one may be an anchor.
    void hide(const Scan& scan, const Block& block) {
        const auto few = [&](int64_t threads) { return dim3(static_cast<unsigned>(quotient_up(threads, 32))); };
        if (r_.anchor == Anchor::id)
            start(kept_anchors, few(block.batch), 32, 0, kept_items(r_.size), r_.anchor_ids + block.first, block.batch,
                  out_.anchor + block.first, flags_.word(kAnchorOutside));
        if (scan.excluded_start)
            start(hide_excluded, dim3(static_cast<unsigned>(block.batch)), 32, 0, w_.kept, scan.excluded_start, scan.excluded_ids);
    }

    // The scores at both ranks, unless a bracket misses one.
    void bracket(int64_t batch) {
        const unsigned queries = static_cast<unsigned>(batch);
        start(sample_brackets, dim3(queries), kSortThreads, kBracketBytes, kept_items(r_.size), w_.brackets, r_.lo, r_.hi);
        start_over(collect_brackets, kept_items(r_.size), batch, 0, w_.brackets);
        start(select_in_brackets, dim3(queries, 2), kSortThreads, (kBins + 2) * sizeof(unsigned), w_.brackets, w_.ranks,
              flags_.word(kRanksMissed));
    }

    // From kept scores: bounds, counts, picks.
    void find_zones(const Scan& scan, const Block& block, bool bracketed) {
        if (r_.ranks && bracketed) bracket(block.batch);
        if (r_.ranks && !bracketed)
            rank(block.batch, [&](const Ranks& ranks) {
                start_over(kept_histogram, kept_items(r_.size), block.batch, 2 * kBins * sizeof(unsigned), ranks);
            });
        Selection zones = block.selection;
        zones.want_top = false, zones.want_picks = plan_.list_picks;
        bound(block, zones.want_picks ? zones.picks : Candidates{}, r_.counts ? zones.counts : nullptr);
        if (zones.want_picks) {
            // Rungs as in `climb`, but a pass over kept scores is cheap: the lowest may overflow, which leaves a limit all the same.
            int64_t rungs[64];
            int count = 0;
            const int64_t wanted = zones.picks.wanted, capacity = zones.picks.capacity;
            for (int64_t items = r_.size; items > (count ? 4 : 1) * capacity;)
                rungs[count++] = items = quotient_up(items * (2 * wanted + 16), capacity);
            while (count > 0) {
                offer_kept(scan, zones, rungs[--count]);
                finish(scan, zones, block, false);
            }
        }
        zones.want_counts = r_.counts;
        if (zones.want_picks || zones.want_counts) offer_kept(scan, zones, r_.size);
        finish(scan, zones, block, true);
    }

    void offer_kept(const Scan& scan, const Selection& selection, int64_t items) {
        start_over(kept_zones, kept_items(items), scan.batch, kWarps * kQueueBytes, selection);
    }

    // About `items` of the kept scores, in tiles evenly spread over all.
    KeptItems kept_items(int64_t items) const {
        Scan scan = {};
        scan.items_per_tile = kKeptTile;
        cover(scan, items);
        return {w_.kept.scores, w_.kept.pitch, r_.size, scan.tiles, scan.stride};
    }

    // Anchors and bounds, once the best and the scores at the ranks are known; what is to be emptied meanwhile, where that is not null.
    void bound(const Block& block, const Candidates& picks, int64_t* counts) {
        const Bounds bounds = {r_.anchor == Anchor::score ? r_.anchor_scores + block.first
                               : plan_.own_best           ? w_.best
                                                          : nullptr,
                               out_.anchor + block.first,
                               out_.lo + block.first,
                               out_.hi + block.first,
                               r_.ranks ? w_.ranks.scores : nullptr,
                               r_.lo,
                               r_.hi};
        start(resolve_bounds, dim3(static_cast<unsigned>(quotient_up(block.batch, 32))), 32, 0, bounds, block.batch, picks, counts);
    }

    // The scores at both ranks, by radix selection; `count` makes the histogram of a level.
    template <typename Count>
    void rank(int64_t batch, const Count& count) {
        fill(w_.ranks.prefixes, 0, batch * 2 * sizeof(uint32_t));
        for (int level = 0; level < kLevels; ++level) {
            fill(w_.ranks.bins, 0, batch * 2 * kBins * sizeof(unsigned long long));
            count(Ranks{level, w_.ranks.bins, w_.ranks.prefixes});
            start(descend_ranks, dim3(static_cast<unsigned>(batch), 2), 32, 0, w_.ranks, level);
        }
    }

    void finish(const Scan& scan, const Selection& s, const Block& block, bool last) {
        const dim3 grid(static_cast<unsigned>(scan.batch));
        if (s.want_top)
            follow(finish_candidates, grid, kSortThreads, kSharedSortBytes, s.top, block.top, last, flags_.word(kTopOverflowed));
        if (s.want_picks)
            follow(finish_candidates, grid, kSortThreads, kSharedSortBytes, s.picks, block.picks, last, flags_.word(kPicksOverflowed));
    }

    // Whoever started what raises a flag has waited for it before: there is nothing under way that still could.
    void lower(Raised flag) {
        if (waits_ && good()) *flags_.word(flag) = 0;
    }

    // To be asked once the host has waited. A host that does not wait has not seen anything yet.
    bool raised(Raised flag) const { return waits_ && good() && flags_.raised(flag); }

    // Fill the lists that are wanted, and count the zones if that is wanted, from the items.
    void list(Scan scan, Selection selection, const Block& block) {
        const bool lists = selection.want_top || selection.want_picks, counts = selection.want_counts;
        if (counts) fill(selection.counts, 0, block.batch * 3 * sizeof(int64_t));
        Selection one = selection;
        one.want_counts = false;
        one.want_picks = false;
        if (selection.want_top) climb(scan, one, block);
        one.want_top = false, one.want_picks = selection.want_picks;
        if (selection.want_picks) climb(scan, one, block);

        if (lists || counts) offer(scan, selection);
        selection.want_counts = false;
        for (bool again = true; again;) {
            lower(kTopOverflowed), lower(kPicksOverflowed);
            finish(scan, selection, block, true);
            synchronize();
            again = raised(kTopOverflowed) || raised(kPicksOverflowed);
            if (again) offer(scan, selection);
        }
        if (r_.zones && r_.anchor == Anchor::id && raised(kAnchorOutside)) status_.fault = Fault::anchor_outside;
    }

    void reset(const Candidates& list, int64_t batch, int64_t held) {
        start(reset_candidates, dim3(static_cast<unsigned>(quotient_up(batch, 32))), 32, 0, list, batch, held);
    }

    // Raise the limits of the one list that is wanted, until all items may be offered. The lowest rung is a sample where it can be.
    void climb(Scan scan, const Selection& selection, const Block& block) {
        const Ladder up = ladder(scan, selection.want_top);
        if (selection.want_top && is_reset_)
            is_reset_ = false;
        else
            reset(selection.want_top ? selection.top : selection.picks, scan.batch, up.sampled * sample_slots());
        if (up.sampled) {
            cover(scan, up.sampled * scan.items_per_tile);
            sieve(scan, selection.top, true);
            finish(scan, selection, block, false);
        }
        for (int rung = up.count; rung > 0;) {
            cover(scan, up.rungs[--rung]);
            offer(scan, selection);
            finish(scan, selection, block, false);
        }
    }

    bool is_reset_ = false;  // the list of the best, by the block's first kernel
    const Result& out_;
};

}  // namespace

CodedItems coded_at(void* memory, int64_t size, int64_t tokens, int64_t width) {
    Carver carver = {static_cast<unsigned char*>(memory)};
    CodedItems coded;
    coded.codes = carver.take<int8_t>(size * tokens * CodedItems::pitch(width));
    coded.scales = carver.take<float>(size * tokens + 1);
    coded.errors = carver.take<float>(size * tokens + 1);
    coded.norms = carver.take<float>(size * tokens + 1);
    return coded;
}

size_t coded_bytes(int64_t size, int64_t tokens, int64_t width) {
    Carver carver = {nullptr};
    carver.take<int8_t>(size * tokens * CodedItems::pitch(width));
    for (int number = 0; number < 3; ++number) carver.take<float>(size * tokens + 1);
    return carver.used;
}

cudaError_t encode(const void* items, bool half_items, int64_t size, int64_t tokens, int64_t width, const CodedItems& coded,
                   cudaStream_t stream) {
    const int64_t rows = size * tokens;
    if (rows == 0) return cudaSuccess;
    return launch(encode_items, dim3(static_cast<unsigned>(quotient_up(rows, kWarps))), kThreads, 0, stream, items, half_items, rows, width,
                  CodedItems::pitch(width), coded);
}

size_t workspace_bytes(const Request& request) { return Workspace(request, Plan(request), nullptr).bytes; }

namespace {

// What `ask` learns from the runner of a request, which nothing is started of.
template <typename Ask>
auto of_runner(const Request& request, const Ask& ask) {
    const Plan plan(request);
    const Workspace space(request, plan, nullptr);
    const Result result = {};
    const Flags flags;
    return ask(Runner(request, result, plan, space, nullptr, flags, true));
}

}  // namespace

bool takes_hopper(const Request& request) {
    return of_runner(request, [](const Runner& runner) { return runner.hopper(); });
}

int queries_a_pass(const Request& request) {
    return of_runner(request, [](const Runner& runner) { return runner.rows(); });
}

namespace {

Status run(const Request& request, const Result& result, void* workspace, size_t bytes, cudaStream_t stream, const Flags& flags,
           bool waits) {
    const Plan plan(request);
    const Workspace space(request, plan, workspace);
    if (space.bytes > bytes || reinterpret_cast<uintptr_t>(workspace) % 256) return {cudaSuccess, Fault::workspace_too_small, 0, 0};
    if (request.batch == 0) return {waits ? cudaStreamSynchronize(stream) : cudaSuccess, Fault::none, 0, 0};
    return Runner(request, result, plan, space, stream, flags, waits).run();
}

}  // namespace

Status select(const Request& request, const Result& result, void* workspace, size_t bytes, cudaStream_t stream) {
    const Flags flags;
    return run(request, result, workspace, bytes, stream, flags, true);
}

Status start(const Request& request, const Result& result, void* workspace, size_t bytes, cudaStream_t stream, const Flags& flags) {
    if (flags.error() != cudaSuccess) return {flags.error(), Fault::none, 0, 0};
    flags.lower_all();
    return run(request, result, workspace, bytes, stream, flags, false);
}

std::optional<Status> ended(const Status& started, const Flags& flags) {
    Status status = started;
    if (flags.raised(kAnchorOutside)) status.fault = Fault::anchor_outside;
    if (status.fault != Fault::none) return status;
    if (flags.raised(kTopOverflowed) || flags.raised(kPicksOverflowed) || flags.raised(kScreenFailed) || flags.raised(kRanksMissed))
        return std::nullopt;
    if (status.rescored >= 0) status.rescored = *flags.word(kRescored);
    return status;
}

}  // namespace dqe::cuda
