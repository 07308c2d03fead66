#include "tiles.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dqe::cpu {

extern const TileKernels kernels_portable;
#if defined(__x86_64__)
extern const TileKernels kernels_avx2, kernels_avx512;
#endif

const TileKernels* const* available_tile_kernels() {
    static const TileKernels* available[4] = {};
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
        if (avx512) available[count++] = &kernels_avx512;
        if (avx2) available[count++] = &kernels_avx2;
#endif
        available[count] = &kernels_portable;
        return true;
    }();
    static_cast<void>(filled);
    return available;
}

}  // namespace dqe::cpu
