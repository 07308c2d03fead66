// The instructions that CUDA C++ has no name for, one thin wrapper each: asynchronous copies, ldmatrix, the matrix products.
//
// Under DQE_HOST_EMULATION each has a host version that follows the lane layouts documented in the PTX ISA manual ("Matrix
// Fragments for mma.m16n8k16 with floating point type", "for mma.m16n8k32", "ldmatrix", "cp.async"), written from the manual and not from
// the kernels, so that a kernel that gets a layout wrong computes a wrong product on the CPU as well.
#pragma once

#include "platform.hpp"

#ifdef DQE_HOST_EMULATION
#include "tests/host_ptx.hpp"
#else
#include <cuda_fp16.h>

namespace dqe::cuda {

__device__ inline float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

// An address in shared memory as the instructions below take it: 32 bits, so that a loop can add to it in one instruction.
__device__ inline uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Copy the first `bytes` (0 to 16) of 16 bytes to shared memory and zero the rest; both addresses are multiples of 16. Visible
// to this thread after cp_async_wait, to the block after the barrier that follows it. The hint lets the cache fetch the 256 bytes
// around: the chunk that follows is read next.
__device__ inline void cp_async_16(uint32_t to, const unsigned char* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The same for 8 or 4 bytes, at addresses that are multiples of that.
template <int Size>
__device__ inline void cp_async_short(uint32_t to, const unsigned char* from, int bytes) {
    static_assert(Size == 4 || Size == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(to), "l"(from), "n"(Size), "r"(bytes) : "memory");
}

// 4 bytes from the third byte of `low` on.
__device__ inline uint32_t middle_of(uint32_t low, uint32_t high) { return __funnelshift_r(low, high, 16); }

// Close a group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Wait until at most `Pending` of this thread's latest groups are unfinished.
template <int Pending>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Of a kernel that was started early (launch_early in platform.hpp): wait until the kernel ahead on the stream has ended, and see what it
// wrote. Otherwise it does nothing.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The kernel behind may start, if it was launched early, as soon as all blocks have come here and multiprocessors have room.
__device__ inline void admit_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Four 8x8 matrices of f16. Lanes 8i to 8i+7 give the addresses of the eight rows of matrix i; of each matrix, lane l receives
// in out[i] the elements 2(l%4) and 2(l%4)+1 of row l/4.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}

// The compiler takes nothing that follows from the value for known before.
__device__ inline void not_known(int& value) { asm volatile("" : "+r"(value)); }

// The larger; NaN if either is.
__device__ inline float nan_max(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

// c += a * b for a 16x16 f16 row by row, b 16x8 f16 column by column, c 16x8 f32.
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 8-bit integers, 32 at a time: c += a * b for a 16x32, b 32x8, c 16x8 in 32 bits.
__device__ inline void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace dqe::cuda
#endif  // DQE_HOST_EMULATION

namespace dqe::cuda {

constexpr int kMostStages = 8;

// cp_async_wait for a count known at run time only (the instruction takes a constant).
__device__ inline void cp_async_wait_for(int pending) {
    switch (pending) {
        case 0:
            return cp_async_wait<0>();
        case 1:
            return cp_async_wait<1>();
        case 2:
            return cp_async_wait<2>();
        case 3:
            return cp_async_wait<3>();
        case 4:
            return cp_async_wait<4>();
        case 5:
            return cp_async_wait<5>();
        default:
            return cp_async_wait<kMostStages - 2>();
    }
}

}  // namespace dqe::cuda
