#define DQE_ISA kernels_dotprod
#define DQE_ISA_NAME "dotprod"
#include "tiles_impl.hpp"
