// The instructions of sm_90a: mbarriers, TMA copies of boxes, warpgroup matrix products, register reallocation. One thin wrapper each,
// beside ptx.hpp.
//
// Under DQE_HOST_EMULATION each has a host version written from the PTX ISA manual ("Asynchronous copy", "mbarrier", "Matrix descriptor",
// "Register fragments for wgmma.mma_async.m64nNk16" and "m64nNk32", "Swizzling modes").
#pragma once

#include "ptx.hpp"
#include "scan.hpp"

#ifdef DQE_HOST_EMULATION
#include "tests/host_hopper.hpp"
#else
#include <cuda.h>

namespace dqe::cuda {

using TensorMap = CUtensorMap;

// Barriers are named by their addresses in shared memory, multiples of 8.
__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// By the thread that initialised them, before the block's barrier: for other threads and for TMA.
__device__ inline void mbarrier_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrive, and make the phase wait for that many bytes as well.
__device__ inline void mbarrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait until the phase of that parity is complete: of a new barrier, the phase before its first (parity 1) is.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t complete;
    do
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                     : "=r"(complete)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    while (!complete);
}

// Start bringing the map's box at element x of row y, zeros beyond the tensor; its bytes count for the barrier.
__device__ inline void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(x), "r"(y)
                 : "memory");
}

template <int Registers>
__device__ inline void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
}
template <int Registers>
__device__ inline void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

// Before the first product after other code touched the accumulators.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Wait until at most `Pending` of the latest groups are unfinished.
template <int Pending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// After the wait, and before ordinary code reads accumulators: the compiler must not read them earlier.
__device__ inline void wgmma_settled(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ inline void wgmma_settled(int& value) { asm volatile("" : "+r"(value)::"memory"); }

// d = a * b + (add ? d : 0) for a 64 x 16, b 128 x 16 (both along D), d 64 x 128. The warp's 16 rows; lane l has rows l / 4 and l / 4 + 8
// of them (d[n][0..1] and d[n][2..3]), columns 8n + 2(l % 4) and the next.
__device__ inline void wgmma_64x128x16(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
#define DQE_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "
        "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}\n"
        : DQE_FOUR(0), DQE_FOUR(1), DQE_FOUR(2), DQE_FOUR(3), DQE_FOUR(4), DQE_FOUR(5), DQE_FOUR(6), DQE_FOUR(7), DQE_FOUR(8), DQE_FOUR(9),
          DQE_FOUR(10), DQE_FOUR(11), DQE_FOUR(12), DQE_FOUR(13), DQE_FOUR(14), DQE_FOUR(15)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#undef DQE_FOUR
}

// The same for 8-bit integers, 64 columns and 32 coordinates: a 64 x 32, b 64 x 32, d 64 x 64 in 32 bits.
__device__ inline void wgmma_64x64x32(int (&d)[8][4], uint64_t a, uint64_t b, bool add) {
#define DQE_FOUR(n) "+r"(d[n][0]), "+r"(d[n][1]), "+r"(d[n][2]), "+r"(d[n][3])
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p;\n}\n"
        : DQE_FOUR(0), DQE_FOUR(1), DQE_FOUR(2), DQE_FOUR(3), DQE_FOUR(4), DQE_FOUR(5), DQE_FOUR(6), DQE_FOUR(7)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#undef DQE_FOUR
}

}  // namespace dqe::cuda
#endif  // DQE_HOST_EMULATION

namespace dqe::cuda {

// Of an operand in shared memory, rows of 128 bytes along D under the 128-byte swizzle: eight rows (1,024 bytes) are a pattern, the next
// eight follow. The product swizzles the addresses it computes, so 16 elements on are 32 bytes on: add 2.
__host__ __device__ constexpr uint64_t wgmma_descriptor(uint32_t address) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{8 * kChunkBytes >> 4} << 32;
    constexpr uint64_t kLeading = uint64_t{1} << 16;  // not used under this swizzle
    return kSwizzle128 | kEightRows | kLeading | (address & 0x3FFFF) >> 4;
}

}  // namespace dqe::cuda
