// Launcher of the kernels for sm_90a, a target of its own: they use instructions that no other architecture has, not even later ones.
#include <algorithm>
#include <type_traits>

#include "hopper_kernel.hpp"

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

// Rows of f16 as boxes of 64 elements by `box_rows` under the 128-byte swizzle.
cudaError_t encode(TensorMap* map, const void* rows, int64_t width, int64_t count, int box_rows) {
    if (!encoder()) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(count)};
    const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(width) * 2};
    const cuuint32_t box[2] = {kChunkBytes / 2, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
    const CUresult result =
        encoder()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(rows), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace
#endif

cudaError_t launch_hopper(const HopperPlan& plan, const Scan& scan, const Candidates& list, bool sampling, int processors,
                          cudaStream_t stream) {
    const int64_t query_tiles = (scan.batch + plan.rows - 1) / plan.rows;
    TensorMap items, queries;
    cudaError_t error = encode(&items, scan.items, scan.width, scan.size * scan.tokens, kColumns);
    if (error == cudaSuccess)
        error = encode(&queries, scan.queries, kChunkBytes / 2, query_tiles * plan.chunks * plan.parts * plan.rows, plan.rows);
    if (error != cudaSuccess) return error;
    const auto with = [&](auto kernel) {
        // One block a multiprocessor, and query tiles vary fastest: blocks that run together read the same items from the L2 cache.
        const int64_t lanes = std::min(scan.tiles, std::max(int64_t{1}, processors / query_tiles));
        const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>(lanes));
        return launch(kernel, grid, kHopperThreads, static_cast<size_t>(plan.bytes()), stream, items, queries, plan, scan, list);
    };
    const auto of = [&](auto sampling) {
        constexpr bool kSampling = decltype(sampling)::value;
        if (plan.parts == 2) return with(hopper_kernel<Product::split_half, 1, kSampling>);
        return plan.rows == 256 ? with(hopper_kernel<Product::half, 2, kSampling>) : with(hopper_kernel<Product::half, 1, kSampling>);
    };
    return sampling ? of(std::true_type()) : of(std::false_type());
}

}  // namespace dqe::cuda
