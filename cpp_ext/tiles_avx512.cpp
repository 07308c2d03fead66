#define DQE_ISA kernels_avx512
#define DQE_ISA_NAME "avx512"
#include "tiles_impl.hpp"
