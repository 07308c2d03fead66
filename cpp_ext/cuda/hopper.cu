// Launchers of the kernels for sm_90a, a target of its own: they use instructions that no other architecture has, not even later ones.
#include <algorithm>

#include "hopper_scores.hpp"
#include "hopper_screen.hpp"

namespace dqe::cuda {

#ifndef DQE_HOST_EMULATION
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function; the module is not linked with the driver, so that it imports where there is none.
Encode encoder() {
    static const Encode found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
    }();
    return found;
}

cudaError_t encode(TensorMap* map, CUtensorMapDataType type, const void* rows, int64_t width, int64_t count, int64_t pitch, int box_width,
                   int box_rows, CUtensorMapSwizzle swizzle) {
    if (!encoder()) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(count)};
    const cuuint64_t pitches[1] = {static_cast<cuuint64_t>(pitch)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_width), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
    const CUresult result = encoder()(map, type, 2, const_cast<void*>(rows), sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Rows of `width` bytes as boxes of 128 bytes by `box_rows` under the 128-byte swizzle.
cudaError_t encode_chunks(TensorMap* map, const void* rows, int64_t width, int64_t count, int box_rows) {
    return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rows, width, count, width, kChunkBytes, box_rows, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Rows of `width` floats, `pitch` bytes apart, as boxes of 128 by `box_rows` as they are.
cudaError_t encode_numbers(TensorMap* map, const float* rows, int64_t width, int64_t count, int64_t pitch, int box_rows) {
    return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, rows, width, count, pitch, kColumns, box_rows, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace
#endif

namespace {

cudaError_t encode_operands(const HopperPlan& plan, const Scan& scan, int64_t width, TensorMap* items, TensorMap* queries) {
    const int64_t query_tiles = (scan.batch + plan.rows - 1) / plan.rows;
    const cudaError_t error = encode_chunks(items, scan.items, width, scan.size * scan.tokens, kColumns);
    if (error != cudaSuccess) return error;
    return encode_chunks(queries, scan.queries, kChunkBytes, query_tiles * plan.chunks * plan.parts * plan.rows, plan.rows);
}

// Blocks that fill the device. Query tiles vary fastest: blocks that run together read the same items from the L2 cache.
dim3 grid_of(const HopperPlan& plan, const Scan& scan, int processors) {
    const int64_t query_tiles = (scan.batch + plan.rows - 1) / plan.rows;
    const int64_t lanes = std::min(scan.tiles, std::max(int64_t{1}, processors * plan.blocks / query_tiles));
    return {static_cast<unsigned>(query_tiles), static_cast<unsigned>(lanes)};
}

}  // namespace

namespace {

template <typename Argument>
using ScoreKernel = void (*)(TensorMap, TensorMap, HopperPlan, Scan, Argument);

// `kernels`: of float32 queries, and of float16 ones in tiles of 128 and 256. Early: they bring the items before the kernel ahead has
// ended, and read nothing else before (see `divide`), so these are the caller's own.
template <bool Early, typename Argument>
cudaError_t launch_scores(const ScoreKernel<Argument> (&kernels)[3], const HopperPlan& plan, const Scan& scan, const Argument& argument,
                          int processors, cudaStream_t stream) {
    TensorMap items, queries;
    const cudaError_t error = encode_operands(plan, scan, scan.width * 2, &items, &queries);
    if (error != cudaSuccess) return error;
    const auto kernel = kernels[plan.parts == 2 ? 0 : plan.rows / 128];
    const dim3 grid = grid_of(plan, scan, processors);
    const auto bytes = static_cast<size_t>(plan.bytes());
    if constexpr (Early) return launch_early(kernel, grid, kHopperThreads, bytes, stream, items, queries, plan, scan, argument);
    return launch(kernel, grid, kHopperThreads, bytes, stream, items, queries, plan, scan, argument);
}

}  // namespace

cudaError_t launch_hopper_top(const HopperPlan& plan, const Scan& scan, const Candidates& list, int processors, cudaStream_t stream) {
    return launch_scores<true, Candidates>(
        {hopper_kernel<Product::split_half, 1, false>, hopper_kernel<Product::half, 1, false>, hopper_kernel<Product::half, 2, false>},
        plan, scan, list, processors, stream);
}

cudaError_t launch_hopper_sample(const HopperPlan& plan, const Scan& scan, const Candidates& list, int processors, cudaStream_t stream) {
    return launch_scores<true, Candidates>(
        {hopper_kernel<Product::split_half, 1, true>, hopper_kernel<Product::half, 1, true>, hopper_kernel<Product::half, 2, true>}, plan,
        scan, list, processors, stream);
}

cudaError_t launch_hopper_keep(const HopperPlan& plan, const Scan& scan, const Keeping& keeping, int processors, cudaStream_t stream) {
    return launch_scores<false, Keeping>(
        {hopper_keep_kernel<Product::split_half, 1>, hopper_keep_kernel<Product::half, 1>, hopper_keep_kernel<Product::half, 2>}, plan,
        scan, keeping, processors, stream);
}

cudaError_t launch_hopper_zones(const HopperPlan& plan, const Scan& scan, const Selection& selection, int processors, cudaStream_t stream) {
    return launch_scores<false, Selection>(
        {hopper_zone_kernel<Product::split_half, 1>, hopper_zone_kernel<Product::half, 1>, hopper_zone_kernel<Product::half, 2>}, plan,
        scan, selection, processors, stream);
}

cudaError_t launch_hopper_screen(const HopperPlan& plan, const Scan& coded, const Screening& screening, int rows, int processors,
                                 cudaStream_t stream) {
    TensorMap items, queries, numbers;
    cudaError_t error = encode_operands(plan, coded, coded.width, &items, &queries);
    if (error == cudaSuccess)
        error = encode_numbers(&numbers, screening.items.scales, coded.size * coded.tokens, 3, screening.items.numbers_pitch(), 3);
    if (error != cudaSuccess) return error;
    return launch_early(hopper_screen_kernel, grid_of(plan, coded, processors), kHopperThreads, static_cast<size_t>(plan.bytes()), stream,
                        items, queries, numbers, plan, coded, screening, rows);
}

}  // namespace dqe::cuda
