// The pass over the codes on sm_90a; screening.hpp says what for. Two blocks share a multiprocessor where shared memory allows, so that
// their warps, four on a scheduler, wait for each other's instructions less.
#pragma once

#include "hopper_kernel.hpp"

namespace dqe::cuda {

constexpr int kScreenProducerRegisters = 32, kScreenConsumerRegisters = 104;
static_assert(kScreenProducerRegisters + kConsumerGroups * kScreenConsumerRegisters <=
              (1 + kConsumerGroups) * (65536 / (2 * kHopperThreads) / 8 * 8));

// As ScreenSieve, with the numbers of a tile in shared memory beside its last chunk. Of two groups of rows a lane has 16 columns each, in
// spans of eight: a bit of a word for each product.
class HopperScreen {
  public:
    using Products = WarpgroupProducts<Product::codes, 1, 2>;

    // `rows`: of the query tiles that pairs are written down for.
    __device__ HopperScreen(const Scan& scan, const Screening& screening, int rows, Shared<unsigned char> queues)
        : scan_(scan),
          above_(static_cast<int>(blockIdx.x) * L::Rows + Products::row_of(threadIdx.x / 32, 0)),
          queue_(screening, above_ / rows, rows, queues) {
        above_ = above_ % rows + threadIdx.x % 32 / 4;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            const int64_t query = L::query_of(group);
            const bool asked = query < scan.batch && screening.queries.errors[query] == screening.queries.errors[query];
            if (asked) asked_ |= 0xFFFFu << group * 16;  // a query without a bound is not screened
            scale_[group] = asked ? screening.queries.scales[query] : 0.0f;
            norm_[group] = asked ? screening.queries.norms[query] : 0.0f;
            error_[group] = asked ? screening.queries.errors[query] : 0.0f;
            limit_[group] = asked ? static_cast<float>(screening.list.limit_keys[query]) : __uint_as_float(0x7F800000);
        }
        idle_ = __ballot_sync(kAllLanes, asked_ != 0) == 0;
    }

    // The largest numbers of a span give bounds that those of its columns do not exceed, rounding included, since every operation ascends.
    // Where one reaches the limit, or is NaN, the column's own numbers decide. `numbers`: scales, errors and norms of the tile's columns.
    __device__ void take(const ColumnTile& columns, const Products& products, Shared<unsigned char> beside) {
        if (idle_) return;
        const Shared<float2> pairs = shared_view<float2>(beside);
        unsigned hits = 0;
#pragma unroll
        for (int span = 0; span < 2; ++span) {
            const int first = L::column_of(span * 8) / 2;
            float scale[8], most_error, most_norm;
#pragma unroll
            for (int place = 0; place < 8; place += 2) {
                const int at = first + place * 2;
                const float2 scales = pairs[at], errors = pairs[at + kColumns / 2], norms = pairs[at + kColumns];
                scale[place] = scales.x, scale[place + 1] = scales.y;
                const float error = nan_max(errors.x, errors.y), norm = nan_max(norms.x, norms.y);
                most_error = place ? nan_max(most_error, error) : error, most_norm = place ? nan_max(most_norm, norm) : norm;
            }
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                const float slack = fmaf(norm_[group], most_error, error_[group] * most_norm);
#pragma unroll
                for (int place = 0; place < 8; ++place) {
                    const float product = L::value_of(products, group, span * 8 + place) * scale[place];
                    if (!(fmaf(product, scale_[group], slack) < limit_[group])) hits |= 1u << (group * 16 + span * 8 + place);
                }
            }
        }
        hits &= asked_;
        if (__ballot_sync(kAllLanes, hits != 0) == 0) return;
        const Shared<float> numbers = shared_view<float>(beside);
        scan_.tokens == 1 ? offer_columns(columns, products, numbers, hits) : offer_spans(columns, products, numbers, hits);
    }

    __device__ void end() { queue_.flush(); }

  private:
    using L = Lane<Products>;

    struct Bounds {
        float upper, lower;
    };
    __device__ Bounds bounds_of(float product, int group, int column, Shared<float> numbers) const {
        product *= numbers[column];
        const float norm = group ? norm_[1] : norm_[0], error = group ? error_[1] : error_[0], scale = group ? scale_[1] : scale_[0];
        const float slack = fmaf(norm, numbers[kColumns + column], error * numbers[2 * kColumns + column]);
        return {fmaf(product, scale, slack), fmaf(product, scale, -slack)};
    }

    // Where every column is an item: each lane's hits one after another.
    __device__ __forceinline__ void offer_columns(const ColumnTile& columns, const Products& products, Shared<float> numbers,
                                                  unsigned hits) {
        for (; __ballot_sync(kAllLanes, hits != 0); hits &= hits - 1) {
            const int hit = hits ? __ffs(static_cast<int>(hits)) - 1 : 0, group = hit / 16, column = L::column_of(hit % 16);
            int product = 0;
#pragma unroll
            for (int other = 0; other < 32; ++other)
                if (other == hit) product = products.value[0][other % 16 / 2][other / 16 * 2 + other % 2];
            const Bounds bounds = bounds_of(static_cast<float>(product), group, column, numbers);
            const int64_t item = columns.first_item + column, query = L::query_of(0) + group * 8;
            const bool reaches = hits && column < columns.columns && !(bounds.upper < (group ? limit_[1] : limit_[0]));
            queue_.push(reaches && !is_excluded(scan_, query, item), above_ + group * 8, item, 1, bounds.upper, bounds.lower);
        }
    }

    __device__ __forceinline__ void offer_spans(const ColumnTile& columns, const Products& products, Shared<float> numbers, unsigned hits) {
#pragma unroll 1
        for (int unit = 0; unit < 4; ++unit) {
            if (__ballot_sync(kAllLanes, (hits >> unit * 8 & 255) != 0) == 0) continue;
            const int group = unit / 2, span = unit % 2;
            float upper[8], lower[8];
#pragma unroll
            for (int place = 0; place < 8; ++place) {
                const int (&here)[4] = products.value[0][place / 2], (&there)[4] = products.value[0][4 + place / 2];
                const int first = group ? here[2 + place % 2] : here[place % 2], second = group ? there[2 + place % 2] : there[place % 2];
                const float product = static_cast<float>(span ? second : first);
                const Bounds bounds = bounds_of(product, group, L::column_of(span * 8 + place), numbers);
                upper[place] = bounds.upper, lower[place] = bounds.lower;
            }
            offer_span(scan_, columns, Products::left(threadIdx.x / 32) + span * 32, upper, lower, (asked_ >> group * 16 & 1) != 0,
                       group ? limit_[1] : limit_[0], L::query_of(0) + group * 8,
                       [&](bool wanted, int64_t item, unsigned tokens, float most, float least) {
                           queue_.push(wanted, above_ + group * 8, item, tokens, most, least);
                       });
        }
    }

    const Scan& scan_;
    int above_;  // rows of the query tile that pairs are written down for, before this lane's first
    PairQueue<true> queue_;
    unsigned asked_ = 0;
    bool idle_;
    float scale_[2], norm_[2], error_[2], limit_[2];
};

// `rows`: as for HopperScreen.
__global__ __launch_bounds__(kHopperThreads, 2) void hopper_screen_kernel(const __grid_constant__ TensorMap items,
                                                                          const __grid_constant__ TensorMap queries,
                                                                          const __grid_constant__ TensorMap numbers, HopperPlan plan,
                                                                          Scan scan, Screening screening, int rows) {
    const HopperBarriers barriers = {shared_address(shared_memory()) + plan.barriers(), plan.stages};
    divide<kScreenProducerRegisters, kScreenConsumerRegisters>(
        barriers, [&] { bring(plan, barriers, items, queries, &numbers, scan); },
        [&] {
            HopperScreen screen(scan, screening, rows, shared_memory() + plan.queues());
            multiply<HopperScreen::Products, true>(
                plan, barriers, scan, [&](const ColumnTile& columns, const HopperScreen::Products& products, int stage) {
                    screen.take(columns, products, shared_memory() + (plan.beside() + stage * kNumberBytes));
                });
            screen.end();
        });
}

}  // namespace dqe::cuda
