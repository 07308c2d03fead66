#define DQE_ISA kernels_portable
#define DQE_ISA_NAME "portable"
#include "tiles_impl.hpp"
