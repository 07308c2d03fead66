#include "tiles.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(DQE_DOTPROD)
#include <sys/auxv.h>
#endif

namespace dqe::cpu {

extern const TileKernels kernels_portable;
#if defined(__x86_64__)
extern const TileKernels kernels_avx2, kernels_avx512;
#if defined(DQE_AMX)
extern const TileKernels kernels_amx;
#endif

namespace {

// Whether the processor multiplies matrix tiles of bytes and the system lets this process. Linux saves the tiles' 8 KiB with a
// thread's state only for processes that have asked for it, once (https://docs.kernel.org/arch/x86/xstate.html).
bool matrix_tiles() {
#if defined(DQE_AMX) && defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) == 0 || (d & kBytes) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace
#elif defined(DQE_DOTPROD)
extern const TileKernels kernels_dotprod;
#endif

const TileKernels* const* available_tile_kernels() {
    static const TileKernels* available[5] = {};
    static const bool filled = [] {
        int count = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        // Older clangs do not know "f16c".
        unsigned a = 0, b = 0, c = 0, d = 0;
        const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
#if defined(DQE_AMX)
        if (avx512 && matrix_tiles()) available[count++] = &kernels_amx;
#endif
        if (avx512) available[count++] = &kernels_avx512;
        if (avx2) available[count++] = &kernels_avx2;
#elif defined(DQE_DOTPROD)
        constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
        if (getauxval(AT_HWCAP) & kDotProducts) available[count++] = &kernels_dotprod;
#endif
        available[count] = &kernels_portable;
        return true;
    }();
    static_cast<void>(filled);
    return available;
}

}  // namespace dqe::cpu
