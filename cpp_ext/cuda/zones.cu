// Launchers: the plan of a selection, and the passes that carry it out.
//
// Top-k and picks are lists of candidates with a limit that certifies them. A ladder of passes over ever larger subsets of the
// items (evenly spread tiles) raises the limit, since the k-th best of any subset bounds the k-th best of all from below; then
// one pass over all items appends what reaches the limit. Each rung lets through less than half of what a list holds, or little
// more where the lowest rung is a sample: the best of each few columns, which is often all of the ladder. If a list
// overflows all the same (an unlucky order of the items), the k-th best of the entries that it did store is a better limit, and
// the pass is repeated: limits are pairs (key, id) and no two entries are equal, so each round leaves at least capacity - k fewer
// to pass, and with all items equal the ids decide. Bounds that are ranks take three histogram passes before.
#include "zones.hpp"

#include <algorithm>
#include <type_traits>

#include "plan.hpp"
#include "query_kernels.hpp"
#include "score_tile.hpp"
#include "sieve.hpp"

namespace dqe::cuda {

namespace {

template <template <int> class Consumer, typename Argument, Product product, int Rows>
__global__ __launch_bounds__(kThreads, 1) void scan_kernel(Scan scan, Argument argument) {
    const SharedPlan plan = SharedPlan::of(Rows, Format<product>::query_parts, scan.chunks, scan.stages, scan.resident);
    Consumer<Rows> consumer(scan, argument, shared_memory() + plan.rows);
    scan_items<product, Rows>(scan, plan, consumer);
    consumer.end();
}

// Two blocks on a multiprocessor, where shared memory allows: a warp waits between instructions for longer than the others need.
template <Product product, int Rows, bool Sampling>
__global__ __launch_bounds__(kThreads, 2) void sieve_kernel(Scan scan, Candidates list) {
    constexpr int kStages = sieve_stages(Rows, Format<product>::query_parts, false);
    const int ring = static_cast<int>(sieve_ring(Rows, Format<product>::query_parts, scan.chunks));
    Sieve<product, Rows> sieve(scan, list, true, shared_memory() + (ring + kStages * kItemStageBytes));
    multiply_items<product, Rows, true, kStages>(scan, ring, kItemStageBytes,
                                                 [&](const ColumnTile& columns, int64_t, const Accumulators<product, Rows>& products) {
                                                     if constexpr (Sampling)
                                                         sieve.sample(columns, products);
                                                     else
                                                         sieve.take(columns, products);
                                                 });
    if constexpr (!Sampling) sieve.end();
}

constexpr int zone_blocks(Product product, int rows) { return product == Product::split_half && rows == 64 ? 1 : 2; }

template <Product product, int Rows>
__global__ __launch_bounds__(kThreads, zone_blocks(product, Rows)) void zone_kernel(Scan scan, Selection selection) {
    constexpr int kStages = sieve_stages(Rows, Format<product>::query_parts, true);
    const int ring = static_cast<int>(sieve_ring(Rows, Format<product>::query_parts, scan.chunks));
    const int queues = ring + kStages * kItemStageBytes;
    Sieve<product, Rows> sieve(scan, selection.top, selection.want_top, shared_memory() + queues);
    ZoneSieve<product, Rows> zones(scan, selection, shared_memory() + (queues + kWarps * kQueueBytes),
                                   shared_memory() + (queues + 2 * kWarps * kQueueBytes));
    multiply_items<product, Rows, true, kStages>(scan, ring, kItemStageBytes,
                                                 [&](const ColumnTile& columns, int64_t, const Accumulators<product, Rows>& products) {
                                                     if (selection.want_top) sieve.take(columns, products);
                                                     zones.take(columns, products);
                                                 });
    sieve.end();
    zones.end();
}

// The first error ends everything that follows: each step is skipped once there is one.
class Runner {
  public:
    Runner(const Request& request, const Result& result, const Plan& plan, const Workspace& space, cudaStream_t stream)
        : r_(request), out_(result), plan_(plan), w_(space), stream_(stream) {}

    Status run() {
        check(flag_.error());
        describe_device();
        choose_tile();
        for (int64_t first = 0; first < r_.batch && good(); first += plan_.block) run_block(first, std::min(plan_.block, r_.batch - first));
        if (status_.error != cudaSuccess) cudaStreamSynchronize(stream_);  // what was started may still write to memory that is lent
        return status_;
    }

  private:
    bool good() const { return status_.error == cudaSuccess && status_.fault == Fault::none; }

    void check(cudaError_t error) {
        if (status_.error == cudaSuccess) status_.error = error;
    }

    void fill(void* where, int value, size_t bytes) {
        if (good() && bytes) check(cudaMemsetAsync(where, value, bytes, stream_));
    }

    template <typename... Params, typename... Args>
    void start(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, const Args&... args) {
        if (good()) check(launch(kernel, grid, threads, shared_bytes, stream_, args...));
    }

    void describe_device() {
        int device = 0;
        check(cudaGetDevice(&device));
        if (good()) check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
        if (good()) check(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        if (good()) check(cudaDeviceGetAttribute(&shared_total_, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    }

    // Larger query tiles read the items less often: 64 rows unless the batch is small or the device has too little shared memory.
    // Keep the queries there if that leaves at least three stages, then as many stages as fit.
    void choose_tile() {
        const auto fits = [&](int rows, int stages, bool resident) {
            return SharedPlan::of(rows, plan_.parts(), plan_.chunks, stages, resident).total <= shared_limit_;
        };
        rows_ = r_.batch > 16 && (fits(64, 2, false) || fits(64, 3, true)) ? 64 : 16;
        resident_ = fits(rows_, 3, true);
        stages_ = kMostStages;
        while (stages_ > 2 && !fits(rows_, stages_, resident_)) --stages_;
        if (good() && !fits(rows_, stages_, resident_)) status_.fault = Fault::shared_memory_too_small;
    }

    Scan scan_of(int64_t first, int64_t batch) {
        const auto* items = static_cast<const unsigned char*>(r_.items);
        const int64_t pitch = r_.width * (r_.half_items ? 2 : 4);
        Scan scan = {};
        scan.queries = w_.queries;
        scan.unscale = w_.unscale;
        if (plan_.product == Product::split_half) scan.exact_queries = static_cast<const float*>(r_.queries) + first * r_.width;
        scan.items = items;
        scan.batch = batch, scan.size = r_.size, scan.tokens = r_.tokens, scan.width = r_.width;
        scan.chunks = plan_.chunks;
        scan.items_per_tile = static_cast<int>(std::max(int64_t{1}, kColumns / r_.tokens));
        scan.steps = r_.tokens > kColumns ? quotient_up(r_.tokens, kColumns) : 1;
        scan.aligned = pitch % 16 == 0 && reinterpret_cast<uintptr_t>(items) % 16 == 0;
        if (r_.excluded_start) scan.excluded_start = r_.excluded_start + first, scan.excluded_ids = r_.excluded_ids;
        scan.stages = stages_, scan.resident = resident_;
        cover(scan, r_.size);
        return scan;
    }

    // Let the pass see about `items` items, in tiles evenly spread over all.
    void cover(Scan& scan, int64_t items) const {
        const int64_t all = quotient_up(r_.size, scan.items_per_tile);
        scan.tiles = std::min(all, std::max(int64_t{1}, items / scan.items_per_tile));
        scan.stride = scan.tiles ? all / scan.tiles : 1;
        if (items >= r_.size) scan.tiles = all, scan.stride = 1;
    }

    template <template <int> class Consumer, typename Argument, Product product, int Rows>
    void start_scan(const Scan& scan, const Argument& argument) {
        const SharedPlan shared = SharedPlan::of(Rows, Format<product>::query_parts, scan.chunks, scan.stages, scan.resident);
        const int64_t query_tiles = quotient_up(scan.batch, Rows);
        const int64_t resident_blocks = processors_ * std::max(1, shared_total_ / (shared.total + 1024));
        const int64_t lanes = std::min(scan.tiles, std::max(int64_t{1}, resident_blocks / query_tiles));
        // Query tiles vary fastest: blocks that run together read the same items, which then come from the L2 cache.
        const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>(lanes));
        start(scan_kernel<Consumer, Argument, product, Rows>, grid, kThreads, shared.total, scan, argument);
        ++status_.passes;
    }

    template <template <int> class Consumer, typename Argument>
    void scan_with(const Scan& scan, const Argument& argument) {
        if (scan.tiles == 0 || !good()) return;
        const bool few = rows_ == 16;
        switch (plan_.product) {
            case Product::half:
                return few ? start_scan<Consumer, Argument, Product::half, 16>(scan, argument)
                           : start_scan<Consumer, Argument, Product::half, 64>(scan, argument);
            case Product::split_half:
                return few ? start_scan<Consumer, Argument, Product::split_half, 16>(scan, argument)
                           : start_scan<Consumer, Argument, Product::split_half, 64>(scan, argument);
            case Product::single:
                return few ? start_scan<Consumer, Argument, Product::single, 16>(scan, argument)
                           : start_scan<Consumer, Argument, Product::single, 64>(scan, argument);
        }
    }

    // Offer the items to the lists that are wanted, and count.
    void offer(const Scan& scan, const Selection& selection) {
        const bool zones = selection.want_picks || selection.want_counts;
        if (!suits(scan, zones)) return scan_with<Select>(scan, selection);
        if (!zones) return sieve(scan, selection.top, false);
        start_sieve(scan, true, zone_blocks(plan_.product, rows_), selection,
                    [](auto product, auto rows) { return zone_kernel<product(), rows()>; });
    }

    void sieve(const Scan& scan, const Candidates& list, bool sampling) {
        start_sieve(scan, false, 2, list, [&](auto product, auto rows) {
            return sampling ? sieve_kernel<product(), rows(), true> : sieve_kernel<product(), rows(), false>;
        });
    }

    bool suits(const Scan& scan, bool zones) const {
        const int span = rows_ == 16 ? Lane<Product::half, 16>::kSpan : Lane<Product::half, 64>::kSpan;
        return plan_.product != Product::single && sieve_suits(scan, span) && (!zones || !scan.excluded_start) &&
               sieve_bytes(rows_, plan_.parts(), scan.chunks, zones) <= shared_limit_;
    }

    // `kernel_of(product, rows)`: both as types whose call is a constant.
    template <typename Argument, typename KernelOf>
    void start_sieve(const Scan& scan, bool zones, int64_t blocks, const Argument& argument, const KernelOf& kernel_of) {
        if (scan.tiles == 0) return;
        const auto of_rows = [&](auto rows) {
            return plan_.product == Product::half ? kernel_of(std::integral_constant<Product, Product::half>(), rows)
                                                  : kernel_of(std::integral_constant<Product, Product::split_half>(), rows);
        };
        const auto kernel = rows_ == 16 ? of_rows(std::integral_constant<int, 16>()) : of_rows(std::integral_constant<int, 64>());
        const int64_t shared = sieve_bytes(rows_, plan_.parts(), scan.chunks, zones);
        const int64_t query_tiles = quotient_up(scan.batch, rows_);
        const int64_t resident_blocks = processors_ * std::clamp(shared_total_ / (shared + 1024), int64_t{1}, blocks);
        const int64_t lanes = std::min(scan.tiles, std::max(int64_t{1}, resident_blocks / query_tiles));
        const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>(lanes));
        start(kernel, grid, kThreads, static_cast<size_t>(shared), scan, argument);
        ++status_.passes;
    }

    void prepare(int64_t first, int64_t batch) {
        const auto* queries = static_cast<const unsigned char*>(r_.queries) + first * r_.width * (r_.half_queries ? 2 : 4);
        const auto with = [&](auto kernel) {
            start(kernel, dim3(static_cast<unsigned>(quotient_up(batch, rows_) * rows_)), 32, 0, queries, r_.half_queries, batch, r_.width,
                  rows_, plan_.chunks, w_.queries, w_.unscale);
        };
        if (plan_.product == Product::half) with(prepare_queries<Product::half>);
        if (plan_.product == Product::split_half) with(prepare_queries<Product::split_half>);
        if (plan_.product == Product::single) with(prepare_queries<Product::single>);
    }

    void run_block(int64_t first, int64_t batch) {
        Scan scan = scan_of(first, batch);
        prepare(first, batch);
        Selection selection = {};
        selection.top = w_.top, selection.picks = w_.picks;
        selection.rule = r_.rule;
        selection.first_query = r_.first_query + first;
        const Finished top = {out_.scores + (r_.k ? first * r_.k : 0), out_.ids + (r_.k ? first * r_.k : 0), r_.k, w_.best};
        if (!r_.zones) {
            selection.want_top = plan_.list_top;
            return list(scan, selection, top, {});
        }
        float* anchor = out_.anchor + first;
        if (plan_.own_best) {
            selection.want_top = true;
            list(scan, selection, top, {});
            selection.want_top = false;
            if (good()) check(cudaMemcpyAsync(anchor, w_.best, batch * sizeof(float), cudaMemcpyDeviceToDevice, stream_));
        } else {
            if (r_.anchor == Anchor::id) gather_anchors(scan, first, batch, anchor);
            selection.want_top = plan_.list_top;
        }
        if (r_.ranks) rank(scan, batch);
        const Bounds bounds = {r_.anchor == Anchor::score ? r_.anchor_scores + first : nullptr,
                               anchor,
                               out_.lo + first,
                               out_.hi + first,
                               r_.ranks ? w_.ranks.scores : nullptr,
                               r_.lo,
                               r_.hi};
        start(resolve_bounds, dim3(static_cast<unsigned>(quotient_up(batch, 32))), 32, 0, bounds, batch);
        selection.want_picks = plan_.list_picks;
        selection.want_counts = r_.counts;
        selection.anchor = bounds.anchor, selection.lo = bounds.lo, selection.hi = bounds.hi;
        if (r_.counts) selection.counts = out_.counts + first * 3, fill(selection.counts, 0, batch * 3 * sizeof(int64_t));
        list(scan, selection, top,
             {out_.pick_scores + (r_.picks ? first * r_.picks : 0), out_.picks + (r_.picks ? first * r_.picks : 0), r_.picks, nullptr});
    }

    // Score each query's anchor item with the very code that scores it as a candidate, so that its own Δ is exactly 0.
    void gather_anchors(Scan scan, int64_t first, int64_t batch, float* anchor) {
        const int64_t rows = quotient_up(batch, rows_) * rows_;
        if (r_.size == 0) {
            status_.fault = Fault::anchor_outside;
            return;
        }
        lower_flag();
        start(gather_ids, dim3(static_cast<unsigned>(quotient_up(rows, 32))), 32, 0, r_.anchor_ids + first, batch, r_.size, w_.gather, rows,
              flag_.word());
        if (read_flag()) status_.fault = Fault::anchor_outside;
        scan.gather = w_.gather;
        scan.excluded_start = nullptr;  // an excluded item may be the anchor
        scan.tiles = quotient_up(rows_, scan.items_per_tile);
        scan.stride = 1;
        scan_with<Gather>(scan, anchor);
    }

    // The scores at both ranks, by radix selection.
    void rank(const Scan& scan, int64_t batch) {
        fill(w_.ranks.prefixes, 0, batch * 2 * sizeof(uint32_t));
        for (int level = 0; level < kLevels; ++level) {
            fill(w_.ranks.bins, 0, batch * 2 * kBins * sizeof(unsigned long long));
            scan_with<Histogram>(scan, Ranks{level, w_.ranks.bins, w_.ranks.prefixes});
            start(descend_ranks, dim3(static_cast<unsigned>(batch), 2), 32, 0, w_.ranks, level);
        }
    }

    void finish(const Scan& scan, const Selection& s, const Finished& top, const Finished& picks, bool last) {
        const dim3 grid(static_cast<unsigned>(scan.batch));
        if (last) lower_flag();
        if (s.want_top) start(finish_candidates, grid, kSortThreads, kSharedSortBytes, s.top, top, last, flag_.word());
        if (s.want_picks) start(finish_candidates, grid, kSortThreads, kSharedSortBytes, s.picks, picks, last, flag_.word());
    }

    // Whoever started what raises the flag has read it before: there is nothing under way that still could.
    void lower_flag() {
        if (good()) *flag_.word() = 0;
    }

    bool read_flag() {
        synchronize();
        return good() && *flag_.word() != 0;
    }

    // Fill the lists that are wanted, and count the zones if that is wanted.
    void list(Scan scan, Selection selection, const Finished& top, const Finished& picks) {
        const bool lists = selection.want_top || selection.want_picks, counts = selection.want_counts;
        if (!lists && !counts) return synchronize();
        Selection one = selection;
        one.want_counts = false;
        one.want_picks = false;
        if (selection.want_top) climb(scan, one, top, picks);
        one.want_top = false, one.want_picks = selection.want_picks;
        if (selection.want_picks) climb(scan, one, top, picks);

        offer(scan, selection);
        if (!lists) return synchronize();
        selection.want_counts = false;
        for (finish(scan, selection, top, picks, true); read_flag(); finish(scan, selection, top, picks, true)) offer(scan, selection);
    }

    // Raise the limits of the one list that is wanted, until all items may be offered. The lowest rung is a sample where it can be.
    void climb(Scan scan, const Selection& selection, const Finished& top, const Finished& picks) {
        int64_t rungs[64];  // each a fourth of the one above or less
        int count = 0;
        int64_t sampled = 0;
        for (int64_t items = r_.size; items > plan_.capacity;) {
            sampled = selection.want_top ? sample_tiles(scan, items) : 0;
            if (sampled) break;
            rungs[count++] = items = quotient_up(items * (2 * plan_.wanted + 16), plan_.capacity);
        }
        const dim3 reset(static_cast<unsigned>(quotient_up(scan.batch, 32)));
        start(reset_candidates, reset, 32, 0, selection.want_top ? selection.top : selection.picks, scan.batch, sampled * sample_slots());
        if (sampled) {
            cover(scan, sampled * scan.items_per_tile);
            sieve(scan, selection.top, true);
            finish(scan, selection, top, picks, false);
        }
        while (count > 0) {
            cover(scan, rungs[--count]);
            offer(scan, selection);
            finish(scan, selection, top, picks, false);
        }
    }

    // Entries that a tile gives a sample, for each query: one for each warp that shares its rows.
    int64_t sample_slots() const {
        return rows_ == 16 ? Accumulators<Product::half, 16>::kAcross : Accumulators<Product::half, 64>::kAcross;
    }

    // How many tiles to sample so that of `items` items no more pass than a list holds, or 0 where that is not to be had. The best of
    // the sample must lie in entries of their own, so there are four times as many; more than a sixteenth of all costs more than it
    // saves.
    int64_t sample_tiles(const Scan& scan, int64_t items) const {
        if (!suits(scan, false)) return 0;
        const int64_t all = quotient_up(r_.size, scan.items_per_tile);
        const int64_t most = std::min(all, std::min(plan_.capacity, int64_t{kSharedSort}) / sample_slots());
        const int64_t seen = quotient_up(items * (plan_.wanted + plan_.wanted / 2 + 16), plan_.capacity);
        const int64_t least = std::max(quotient_up(seen, scan.items_per_tile), quotient_up(4 * plan_.wanted, sample_slots()));
        return least <= most ? std::clamp(all / 16, least, most) : 0;
    }

    void synchronize() {
        if (good()) check(cudaStreamSynchronize(stream_));
    }

    const Request& r_;
    const Result& out_;
    const Plan& plan_;
    const Workspace& w_;
    cudaStream_t stream_;
    Status status_ = {cudaSuccess, Fault::none, 0};
    int processors_ = 1, shared_limit_ = 0, shared_total_ = 0;
    int rows_ = 16, stages_ = 2;  // of a query tile; of the ring
    bool resident_ = false;
    Flag flag_;
};

}  // namespace

size_t workspace_bytes(const Request& request) { return Workspace(request, Plan(request), nullptr).bytes; }

Status select(const Request& request, const Result& result, void* workspace, size_t bytes, cudaStream_t stream) {
    const Plan plan(request);
    const Workspace space(request, plan, workspace);
    if (space.bytes > bytes || reinterpret_cast<uintptr_t>(workspace) % 256) return {cudaSuccess, Fault::workspace_too_small, 0};
    if (request.batch == 0) return {cudaSuccess, Fault::none, 0};
    return Runner(request, result, plan, space, stream).run();
}

}  // namespace dqe::cuda
