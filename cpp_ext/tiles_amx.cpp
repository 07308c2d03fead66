#define DQE_ISA kernels_amx
#define DQE_ISA_NAME "amx"
#include "tiles_impl.hpp"
