// Passes over the items: what starts their kernels. The first error ends everything that follows: each step is skipped
// once there is one.
#pragma once

#include <algorithm>
#include <type_traits>

#include "begin.hpp"
#include "hopper.hpp"
#include "plan.hpp"
#include "rescore.hpp"
#include "scan_kernels.hpp"

namespace dqe::cuda {

class Passes {
  public:
    bool hopper() const { return hopper_.rows > 0; }

    // waits: for the device, to find what overflowed; otherwise whoever holds the flags does.
    Passes(const Request& request, const Plan& plan, const Workspace& space, cudaStream_t stream, const Flags& flags, bool waits)
        : r_(request), plan_(plan), w_(space), stream_(stream), flags_(flags), waits_(waits) {
        check(flags_.error());
        describe_device();
        choose_tile();
    }

  protected:
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

    // The same for a kernel that awaits the one ahead itself, and may start before that has ended.
    template <typename... Params, typename... Args>
    void follow(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, const Args&... args) {
        if (!kHopperBuilt || !sm_90_) return start(kernel, grid, threads, shared_bytes, args...);
        if (good()) check(launch_early(kernel, grid, threads, shared_bytes, stream_, args...));
    }

    void describe_device() {
        int device = 0;
        check(cudaGetDevice(&device));
        sm_90_ = on_hopper();
        if (good()) check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
        if (good()) check(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        if (good()) check(cudaDeviceGetAttribute(&shared_total_, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    }

    // Larger query tiles read the items less often: 64 rows unless the batch is small or the device has too little shared memory.
    // Keep the queries there if that leaves at least three stages, then as many stages as fit.
    void choose_tile() {
        // All passes of a request that give scores multiply in the same way, so that limits mean the same in each: products of another
        // instruction may round otherwise. What bounds leave is scored by the kernels for sm_80, so these take the sample, too, and the
        // pass over the items where bounds decide nothing. Products of codes are exact: any instruction may have them.
        if (kHopperBuilt && sm_90_ && !r_.portable && plan_.screens)
            hopper_screen_ = hopper_screen_plan(r_.size, r_.tokens, plan_.code_chunks, r_.coded, shared_limit_, shared_total_);
        const bool zones_served = !r_.zones || plan_.keeps || plan_.sieves;
        if (kHopperBuilt && sm_90_ && !r_.portable && !plan_.screens && zones_served && plan_.product != Product::single)
            hopper_ = hopper_plan(std::min(r_.batch, plan_.block), r_.size, r_.tokens, plan_.parts(), plan_.chunks, unit(), plan_.sieves,
                                  shared_limit_);
        if (hopper()) {
            rows_ = hopper_.rows;
            return;
        }
        const auto fits = [&](int rows, int stages, bool resident) {
            return SharedPlan::of(rows, plan_.parts(), plan_.chunks, stages, resident).total <= shared_limit_;
        };
        const bool wide = r_.batch > 16 || (plan_.screens && r_.tokens == 32);  // a warp of the small tile screens 16 columns
        rows_ = wide && (fits(64, 2, false) || fits(64, 3, true)) ? 64 : 16;
        resident_ = fits(rows_, 3, true);
        stages_ = kMostStages;
        while (stages_ > 2 && !fits(rows_, stages_, resident_)) --stages_;
        if (good() && !fits(rows_, stages_, resident_)) status_.fault = Fault::shared_memory_too_small;
    }

    // Bytes that each row begins at a multiple of.
    int unit() const {
        const int64_t pitch = r_.width * (r_.half_items ? 2 : 4);
        int unit = 16;
        while ((pitch | static_cast<int64_t>(reinterpret_cast<uintptr_t>(r_.items))) % unit) unit /= 2;
        return unit;
    }

    Scan scan_of(int64_t first, int64_t batch) {
        const auto* items = static_cast<const unsigned char*>(r_.items);
        Scan scan = {};
        scan.queries = w_.queries;
        scan.unscale = w_.unscale;
        if (plan_.product == Product::split_half) scan.exact_queries = static_cast<const float*>(r_.queries) + first * r_.width;
        scan.items = items;
        scan.batch = batch, scan.size = r_.size, scan.tokens = r_.tokens, scan.width = r_.width;
        scan.chunks = plan_.chunks;
        scan.items_per_tile = static_cast<int>(std::max(int64_t{1}, kColumns / r_.tokens));
        scan.steps = r_.tokens > kColumns ? quotient_up(r_.tokens, kColumns) : 1;
        scan.unit = unit();
        if (r_.excludes) scan.excluded_start = r_.excluded_start + first, scan.excluded_ids = r_.excluded_ids;
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
        follow(scan_kernel<Consumer, Argument, product, Rows>, grid, kThreads, shared.total, scan, argument);
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
            case Product::codes:  // no scores come of them
                return;
        }
    }

    // Offer the items to the lists that are wanted, and count.
    void offer(const Scan& scan, const Selection& selection) {
        const bool zones = selection.want_picks || selection.want_counts;
        if (!suits(scan, zones)) return scan_with<Select>(scan, selection);
        if (!zones) return sieve(scan, selection.top, false);
        if constexpr (kHopperBuilt)
            if (hopper()) return start_hopper(launch_hopper_zones, scan, selection);
        start_sieve(scan, true, zone_blocks(plan_.product, rows_), selection,
                    [](auto product, auto rows) { return zone_kernel<product(), rows()>; });
    }

    void sieve(const Scan& scan, const Candidates& list, bool sampling) {
        if constexpr (kHopperBuilt)
            if (hopper()) return start_hopper(sampling ? launch_hopper_sample : launch_hopper_top, scan, list);
        start_sieve(scan, false, 2, list, [&](auto product, auto rows) {
            return sampling ? sieve_kernel<product(), rows(), true> : sieve_kernel<product(), rows(), false>;
        });
    }

    // The pass over all items that keeps their scores, and offers them to the list of the best if that is wanted.
    void keep(const Scan& scan, const Kept& kept, const Selection& selection) {
        if (!suits(scan, false)) return scan_with<KeepingSelect>(scan, Keeping{kept, selection});
        if constexpr (kHopperBuilt)
            if (hopper()) return start_hopper(launch_hopper_keep, scan, Keeping{kept, selection});
        start_sieve(scan, false, 2, Keeping{kept, selection}, [](auto product, auto rows) { return keep_kernel<product(), rows()>; });
    }

    template <typename Argument>
    void start_hopper(HopperLaunch<Argument>* launch, const Scan& scan, const Argument& argument) {
        if (!good() || scan.tiles == 0) return;
        check(launch(hopper_, scan, argument, processors_, stream_));
        ++status_.passes;
    }

    // Score the items of these ids, one for each query, with the very code that scores them as candidates, so that the Δ of an anchor's own
    // item is exactly 0. TMA brings neighbouring items alone: for the kernels for sm_90a the anchors' items are copied together, and a pass
    // over these keeps the scores of all queries for all of them, few beside those of a pass over all items.
    void score_anchors(Scan scan, const int64_t* ids, float* anchors) {
        const auto few = [&](int64_t threads) { return dim3(static_cast<unsigned>(quotient_up(threads, 32))); };
        volatile unsigned* const outside = flags_.word(kAnchorOutside);
        scan.excluded_start = nullptr;  // an excluded item may be the anchor
        scan.stride = 1;
        if (hopper()) {
            start(copy_items, dim3(static_cast<unsigned>(scan.batch)), kThreads, 0, ids, scan.size, scan.tokens * scan.width * 2 / 16,
                  reinterpret_cast<const uint4*>(scan.items), reinterpret_cast<uint4*>(w_.anchor_items), outside);
            scan.items = w_.anchor_items, scan.size = scan.batch;
            scan.tiles = quotient_up(scan.size, scan.items_per_tile);
            keep(scan, w_.anchor_scores, Selection{});
            const KeptItems kept = {w_.anchor_scores.scores, w_.anchor_scores.pitch, scan.size, 0, 0};
            start(kept_anchors, few(scan.batch), 32, 0, kept, static_cast<const int64_t*>(nullptr), scan.batch, anchors, outside);
            return;
        }
        const int64_t rows = quotient_up(scan.batch, rows_) * rows_;
        start(gather_ids, few(rows), 32, 0, ids, scan.batch, scan.size, w_.gather, rows, outside);
        scan.gather = w_.gather;
        scan.gather_pitch = scan.gathered = rows_;
        scan.tiles = quotient_up(rows_, scan.items_per_tile);
        scan_with<Gather>(scan, Gathering{anchors, nullptr, nullptr, nullptr, {}, nullptr});
    }

    // The scan of the codes, for `screen`.
    Scan coded_scan(const Scan& scan) const {
        Scan coded = scan;
        coded.queries = w_.coded.codes;
        coded.items = reinterpret_cast<const unsigned char*>(r_.coded.codes);
        coded.width = CodedItems::pitch(r_.width);
        coded.chunks = plan_.code_chunks;
        coded.unit = 16;
        return coded;
    }

    // Rows of the query tiles that the pass over the codes takes.
    int code_rows() const { return hopper_screen_.rows ? hopper_screen_.rows : rows_; }

    bool screen_suits(const Scan& coded) const {
        if (hopper_screen_.rows) return true;
        const int span = rows_ == 16 ? Lane<Accumulators<Product::codes, 16>>::kSpan : Lane<Accumulators<Product::codes, 64>>::kSpan;
        return sieve_suits(coded, span) && screen_bytes(rows_, coded.chunks) <= shared_limit_;
    }

    // Pairs whose bound reaches the limits of the list, and lower bounds in the list.
    void screen(const Scan& coded, const Screening& screening) {
        if constexpr (kHopperBuilt)
            if (hopper_screen_.rows) {
                if (!good() || coded.tiles == 0) return;
                check(launch_hopper_screen(hopper_screen_, coded, screening, rows_, processors_, stream_));
                ++status_.passes;
                return;
            }
        start_lanes(rows_ == 16 ? screen_kernel<16> : screen_kernel<64>, coded, screen_bytes(rows_, coded.chunks), 2, screening);
    }

    // The scores of the pairs that reach the limits which the list has now, in the list.
    void rescore(const Scan& scan, const Pairs& pairs, const Columns& columns, const Candidates& list) {
        const unsigned query_tiles = static_cast<unsigned>(quotient_up(scan.batch, rows_));
        const dim3 grid(query_tiles, static_cast<unsigned>(quotient_up(4 * processors_, query_tiles)));
        follow(spread_pairs, grid, kThreads, 0, pairs, columns, list, rows_, scan.tokens, flags_.word(kScreenFailed));
        Scan gathered = scan;
        gathered.size *= scan.tokens, gathered.tokens = gathered.steps = gathered.stride = 1, gathered.items_per_tile = kColumns;
        gathered.gather = columns.tokens, gathered.gather_pitch = gathered.gathered = columns.capacity;
        gathered.tiles = quotient_up(columns.capacity, kColumns);
        gathered.excluded_start = nullptr;
        const bool at_once = scan.tokens == 1;  // an item's only token is its score
        scan_with<Gather>(gathered, Gathering{nullptr, columns.rows, columns.scores, columns.counts, at_once ? list : Candidates{},
                                              flags_.word(kRescored)});
        if (at_once) return;
        follow(collect_scores, grid, kThreads, 0, pairs, columns, list, rows_, flags_.word(kRescored));
    }

    bool suits(const Scan& scan, bool zones) const {
        if (hopper()) return true;
        const int span = rows_ == 16 ? Lane<Accumulators<Product::half, 16>>::kSpan : Lane<Accumulators<Product::half, 64>>::kSpan;
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
        start_lanes(kernel, scan, sieve_bytes(rows_, plan_.parts(), scan.chunks, zones), blocks, argument);
    }

    // A grid that fills the device, `blocks` on a multiprocessor where shared memory allows.
    template <typename Kernel, typename Argument>
    void start_lanes(const Kernel& kernel, const Scan& scan, int64_t shared, int64_t blocks, const Argument& argument) {
        const int64_t query_tiles = quotient_up(scan.batch, rows_);
        const int64_t resident_blocks = processors_ * std::clamp(shared_total_ / (shared + 1024), int64_t{1}, blocks);
        const int64_t lanes = std::min(scan.tiles, std::max(int64_t{1}, resident_blocks / query_tiles));
        const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>(lanes));
        follow(kernel, grid, kThreads, static_cast<size_t>(shared), scan, argument);
        ++status_.passes;
    }

    // A kernel over kept scores: a block for each query and some of the tiles.
    template <typename... Params, typename... Args>
    void start_over(void (*kernel)(Params...), const KeptItems& items, int64_t batch, size_t shared_bytes, const Args&... args) {
        constexpr int64_t kBlocks = 8;  // of kThreads on a multiprocessor
        const int64_t lanes = std::clamp(quotient_up(processors_ * kBlocks, batch), int64_t{1}, items.tiles);
        start(kernel, dim3(static_cast<unsigned>(batch), static_cast<unsigned>(lanes)), kThreads, shared_bytes, items, args...);
    }

    // Prepare the queries; reset the list, if one is given, and what a screen writes to if there is one.
    void begin(int64_t first, int64_t batch, const Candidates& list, int64_t held, bool screened) {
        Beginning b = {};
        b.queries = static_cast<const unsigned char*>(r_.queries) + first * r_.width * (r_.half_queries ? 2 : 4);
        b.half = r_.half_queries, b.batch = batch, b.width = r_.width;
        b.rows = rows_, b.chunks = plan_.chunks, b.prepared = w_.queries, b.unscale = w_.unscale;
        b.list = list, b.held = held;
        int64_t rows = quotient_up(batch, rows_) * rows_;
        if (screened) {
            b.code_rows = code_rows(), b.code_chunks = plan_.code_chunks, b.coded = w_.coded;
            b.pair_counts = w_.pairs.counts, b.column_counts = w_.columns.counts, b.tiles = quotient_up(batch, rows_);
            b.failed = flags_.word(kScreenFailed);
            rows = std::max(rows, quotient_up(batch, b.code_rows) * b.code_rows);
        }
        const dim3 grid(static_cast<unsigned>(rows), screened ? 2 : 1);
        if (plan_.product == Product::half) start(begin_queries<Product::half>, grid, 32, 0, b);
        if (plan_.product == Product::split_half) start(begin_queries<Product::split_half>, grid, 32, 0, b);
        if (plan_.product == Product::single) start(begin_queries<Product::single>, grid, 32, 0, b);
    }

    // Entries that a tile gives a sample, for each query: one for each warp that shares its rows.
    int64_t sample_slots() const {
        if (hopper()) return kHopperAcross;
        return rows_ == 16 ? Accumulators<Product::half, 16>::kAcross : Accumulators<Product::half, 64>::kAcross;
    }

    // The share of the items that is worth sampling, one in so many. On a Hopper up to 128 queries wait for memory, whatever passes, and
    // the sample is as small as may be; with 256 rows in a tile, entries that pass hold up the products.
    int64_t sample_share() const {
        if (!hopper()) return 16;
        if (r_.batch <= 128) return int64_t{1} << 40;
        return hopper_.rows < 256 ? 16 : r_.batch <= 256 ? 12 : 8;
    }

    // How many tiles to sample so that of `items` items no more pass than a list holds, or 0 where that is not to be had. The best of
    // the sample must lie in entries of their own, so there are four times as many.
    int64_t sample_tiles(const Scan& scan, int64_t items) const {
        if (!suits(scan, false)) return 0;
        const int64_t all = quotient_up(r_.size, scan.items_per_tile);
        const int64_t most = std::min(all, std::min(plan_.capacity, int64_t{kSharedSort}) / sample_slots());
        const int64_t seen = quotient_up(items * (plan_.wanted + plan_.wanted / 2 + 16), plan_.capacity);
        const int64_t least = std::max(quotient_up(seen, scan.items_per_tile), quotient_up(4 * plan_.wanted, sample_slots()));
        return least <= most ? std::clamp(all / sample_share(), least, most) : 0;
    }

    // The subsets of the items that raise the limits of a list, from the lowest: a sample, where it can be one, and rungs, each a fourth of
    // the one above or less.
    struct Ladder {
        int64_t rungs[64];
        int count = 0;
        int64_t sampled = 0;  // tiles
    };

    Ladder ladder(const Scan& scan, bool top) const {
        Ladder made;
        for (int64_t items = r_.size; items > plan_.capacity;) {
            made.sampled = top ? sample_tiles(scan, items) : 0;
            if (made.sampled) break;
            made.rungs[made.count++] = items = quotient_up(items * (2 * plan_.wanted + 16), plan_.capacity);
        }
        return made;
    }

    void synchronize() {
        if (waits_ && good()) check(cudaStreamSynchronize(stream_));
    }

    const Request& r_;
    const Plan& plan_;
    const Workspace& w_;
    cudaStream_t stream_;
    Status status_ = {cudaSuccess, Fault::none, 0, 0};
    int rows_ = 16;  // of a query tile
    const Flags& flags_;
    const bool waits_;

  private:
    int processors_ = 1, shared_limit_ = 0, shared_total_ = 0;
    int stages_ = 2;  // of the ring
    bool resident_ = false, sm_90_ = false;
    HopperPlan hopper_ = {}, hopper_screen_ = {};
};

}  // namespace dqe::cuda
