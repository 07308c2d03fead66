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

// See host_streams.hpp.
extern "C" __attribute__((visibility("default"))) void emulate_streams(bool late, bool captured) {
    cudaDeviceSynchronize();
    emulation::streams.late = late, emulation::streams.captured = captured;
}

extern "C" __attribute__((visibility("default"))) int64_t emulated_waits() { return emulation::streams.waits; }

extern "C" __attribute__((visibility("default"))) int64_t emulated_written_after_free() { return emulation::written_after_free(); }

// Work of the caller's on a stream, which writes over memory.
extern "C" __attribute__((visibility("default"))) void emulate_fill(uint64_t stream, void* data, int value, size_t bytes) {
    cudaMemsetAsync(data, value, bytes, reinterpret_cast<cudaStream_t>(stream));
}
