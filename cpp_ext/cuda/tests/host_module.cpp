// Test only: the Python module on the emulation, so that the adapter is tested where there is no device.
#define DQE_HOST_EMULATION
#define DQE_HOPPER
#include "../hopper.cu"
#include "../zones.cu"
// After the kernels; what a build for a device compiles, unchanged.
#include "../bindings.cpp"

extern "C" __attribute__((visibility("default"))) int64_t emulated_allocations() { return emulation::machine.allocations; }

extern "C" __attribute__((visibility("default"))) void emulate_capability(int capability) { emulation::machine.capability = capability; }

extern "C" __attribute__((visibility("default"))) const char* emulated_log() { return emulation::machine.log.c_str(); }
