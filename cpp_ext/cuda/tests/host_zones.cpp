// Test only: the kernels' sources on the CPU behind a C interface, for tests/support/emulated_cuda.py (through ctypes).
#define DQE_HOST_EMULATION
#define DQE_HOPPER
#include "../zones.cu"
// As a target of its own it is compiled for sm_90a.
#include "../hopper.cu"

using namespace dqe::cuda;

namespace {

constexpr size_t kPage = 4096;

// Memory between two pages that nobody may touch, its end against the second: an overrun stops the process.
struct Guarded {
    unsigned char *start, *data;
    size_t room, bytes;

    explicit Guarded(size_t bytes, size_t alignment = 1) : bytes(bytes) {
        room = (bytes + kPage - 1) / kPage * kPage;
        start = static_cast<unsigned char*>(mmap(nullptr, room + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (start == MAP_FAILED || (room && mprotect(start + kPage, room, PROT_READ | PROT_WRITE))) std::abort();
        data = start + kPage + (room - bytes) / alignment * alignment;
        if (bytes) std::memset(data, 0xFF, bytes);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(start, room + 2 * kPage); }
};

template <typename T>
const T* copied(Guarded& memory, const void* from) {
    if (memory.bytes) std::memcpy(memory.data, from, memory.bytes);
    return reinterpret_cast<const T*>(memory.data);
}

}  // namespace

extern "C" {

struct Settings {
    int shared_limit, multiprocessors;
    uint64_t order;
    int stale_reads, wrong_lanes;
    int64_t kept_limit;
    int capability, hopper_fault;
    float error_scale;  // corruption for the tests of the tests: of the norms that bounds are made of
    int64_t unawaited;  // the same: see Machine
};

// Of all calls so far; of the last: how many of its launches were early.
struct Counts {
    int64_t launches, fills, waits, early;
};

// Returns the passes made, or -1 and a message. Inputs are copied to guarded memory first.
int64_t emulated_select(const Settings* settings, const Request* given, const Result* result, int64_t excluded, int64_t* rescored,
                        char* message, int room) {
    Request request = *given;
    emulation::machine.shared_limit = settings->shared_limit;
    emulation::machine.multiprocessors = settings->multiprocessors;
    emulation::machine.order = settings->order;
    emulation::machine.stale_reads = settings->stale_reads;
    emulation::machine.wrong_lanes = settings->wrong_lanes;
    emulation::machine.kept_limit = settings->kept_limit;
    emulation::machine.capability = settings->capability;
    emulation::hopper.fault = settings->hopper_fault;
    emulation::machine.early_launches = 0;
    emulation::machine.unawaited = settings->unawaited;
    emulation::machine.error.clear();
    Guarded queries(request.batch * request.width * (request.half_queries ? 2 : 4));
    Guarded items(request.size * request.tokens * request.width * (request.half_items ? 2 : 4));
    Guarded start(request.excludes ? (request.batch + 1) * 8 : 0), ids(excluded * 8);
    request.queries = copied<void>(queries, request.queries);
    request.items = copied<void>(items, request.items);
    if (request.excludes) {
        request.excluded_start = copied<int64_t>(start, request.excluded_start);
        request.excluded_ids = copied<int64_t>(ids, request.excluded_ids);
    }
    Guarded codes(request.screened ? coded_bytes(request.size, request.tokens, request.width) : 0, 256);
    if (request.screened) {
        request.coded = coded_at(codes.data, request.size, request.tokens, request.width);
        if (encode(request.items, request.half_items, request.size, request.tokens, request.width, request.coded, nullptr) != cudaSuccess)
            return -1;
        for (int64_t token = 0; token < request.size * request.tokens; ++token) request.coded.errors[token] *= settings->error_scale;
    }
    const size_t bytes = workspace_bytes(request);
    Guarded workspace(bytes, 256);
    const emulation::Hiding hiding(workspace.start + kPage, workspace.room);
    const Status status = select(request, *result, workspace.data, bytes, nullptr);
    *rescored = status.rescored;
    if (status.error == cudaSuccess && status.fault == Fault::none) return status.passes;
    std::snprintf(message, room, "error %d, fault %d: %s", static_cast<int>(status.error), static_cast<int>(status.fault),
                  emulation::machine.error.c_str());
    return -1;
}

bool emulated_takes_hopper(const Request* request, int capability, int shared_limit, int64_t kept_limit) {
    emulation::machine.kept_limit = kept_limit;
    emulation::machine.capability = capability;
    emulation::machine.shared_limit = shared_limit;
    return takes_hopper(*request);
}

// Codes as int8 (rows, pitch), and scales, errors, norms (rows).
void emulated_encode(const void* items, bool half, int64_t rows, int64_t width, int8_t* codes, float* scales, float* errors, float* norms) {
    emulation::machine.order = 0;
    if (encode(items, half, rows, 1, width, {codes, scales, errors, norms}, nullptr) != cudaSuccess) std::abort();
}

void emulated_counts(Counts* counts) {
    *counts = {emulation::machine.launches, emulation::machine.fills, emulation::streams.waits, emulation::machine.early_launches};
}

uint64_t emulated_workspace_bytes(const Request* request) { return workspace_bytes(*request); }
}

// Kernels that do what the emulation must catch, one fault each; 0 is the same kernel without.
namespace {

void faulty(int fault, const unsigned char* global, float* out) {
    const Shared<unsigned char> shared = shared_memory();
    const Shared<float> values = shared_view<float>(shared);
    const int thread = threadIdx.x;
    if (fault != 1) values[thread] = 1.0f;
    if (fault == 2 && thread == 63) return;  // others wait at the barrier
    if (fault == 3 && thread == 5)
        __syncthreads();  // another barrier than the rest
    else if (fault != 4)
        __syncthreads();
    out[thread] = values[(thread + 33) % 64];
    if (fault == 5) values[64 + thread] = 0.0f;
    if (fault == 6) values[thread + 32] = values[thread];
    if (thread < 32 && (fault != 7 || thread != 9)) out[0] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
    if (thread == 0) {
        cp_async_16(shared_address(shared) + 256, global, 16);
        cp_async_commit();
        if (fault != 8) cp_async_wait<0>();
        if (fault == 9) cp_async_16(shared_address(shared) + 264, global, 16);
        out[0] = values[64];
        cp_async_wait<0>();
    }
    if (fault == 10) out[1] = values[64];  // no barrier since the copy
}

}  // namespace

extern "C" int emulated_fault(int fault, char* message, int room) {
    alignas(16) static const unsigned char global[16] = {};
    float out[64];
    emulation::machine.error.clear();
    emulation::machine.order = 0;
    emulation::machine.stale_reads = 0;
    const int bytes = fault == 5 ? 256 : 512;
    const cudaError_t error =
        launch(faulty, dim3(1), 64, bytes, nullptr, fault, static_cast<const unsigned char*>(global), static_cast<float*>(out));
    std::snprintf(message, room, "%s", emulation::machine.error.c_str());
    return error;
}

extern "C" void emulated_halves(const float* from, uint16_t* to, float* back, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_half(from[i]), back[i] = half_to_float(to[i]);
}
