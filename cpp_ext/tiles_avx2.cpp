#define DQE_ISA kernels_avx2
#define DQE_ISA_NAME "avx2"
#include "tiles_impl.hpp"
