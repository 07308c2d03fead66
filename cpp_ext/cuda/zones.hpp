// Zone selection on a CUDA device: raw pointers, sizes, a stream, a status. dqe_engine/zones/reference.py is the definition.
#pragma once

#include <optional>

#include "../zone_select.hpp"
#include "flags.hpp"
#include "platform.hpp"

namespace dqe::cuda {

enum class Anchor : int { best = 0, id = 1, score = 2 };

// Items as 8-bit codes: (size, tokens, pitch) and three numbers for each token.
struct CodedItems {
    int8_t* codes;
    float *scales, *errors, *norms;  // (size, tokens)

    static constexpr int64_t pitch(int64_t width) { return (width + 15) / 16 * 16; }

    // Bytes from the scales to the errors, and from these to the norms; 0 where the two differ.
    int64_t numbers_pitch() const {
        const int64_t pitch = reinterpret_cast<intptr_t>(errors) - reinterpret_cast<intptr_t>(scales);
        return reinterpret_cast<intptr_t>(norms) - reinterpret_cast<intptr_t>(errors) == pitch ? pitch : 0;
    }
};

// All pointers are device memory, row-major. Sizes may be 0; a pointer to nothing may be null.
struct Request {
    const void* queries;  // (batch, width) f32, or f16 if half_queries
    const void* items;    // (size, tokens, width) f32, or f16 if half_items
    bool half_queries, half_items;
    int64_t batch, size, tokens, width;
    int64_t k, picks;
    bool zones, counts;  // `zones`: bounds, anchor and rule apply
    Anchor anchor;
    const int64_t* anchor_ids;   // (batch), for Anchor::id
    const float* anchor_scores;  // (batch), for Anchor::score
    bool ranks;                  // lo and hi are ranks in a query's list, as fractions of its length; not distances
    double lo, hi;
    PickRule rule;
    int64_t first_query;
    bool excludes;                  // the lists that follow apply
    const int64_t* excluded_start;  // (batch + 1) into excluded_ids
    const int64_t* excluded_ids;    // ascending per query
    bool portable;                  // take the kernels for sm_80 and later, also where those for sm_90a would serve
    bool screened;                  // top-k without zones is found from `coded`, if its shape suits that
    CodedItems coded;               // of `items`, by encode()
};

// Device memory of the caller; null where not asked for.
struct Result {
    float* scores;  // (batch, k)
    int64_t* ids;
    int64_t* counts;  // (batch, 3)
    int64_t* picks;   // (batch, picks)
    float* pick_scores;
    float* lo;  // (batch), with zones
    float* hi;
    float* anchor;
};

enum class Fault : int { none = 0, anchor_outside = 1, workspace_too_small = 2, shared_memory_too_small = 3 };

struct Status {
    cudaError_t error;
    Fault fault;
    int64_t passes;    // over all items, or (fewer) over some of them
    int64_t rescored;  // tokens that were scored after screening; -1 where some queries could not be screened
};

// Bytes of device memory that the codes of items take, and what lies where; `memory` is 256-byte aligned.
size_t coded_bytes(int64_t size, int64_t tokens, int64_t width);
CodedItems coded_at(void* memory, int64_t size, int64_t tokens, int64_t width);

// Codes of (size, tokens, width) items, on `stream`; does not wait.
cudaError_t encode(const void* items, bool half_items, int64_t size, int64_t tokens, int64_t width, const CodedItems& coded,
                   cudaStream_t stream);

// Whether a request takes the kernels for sm_90a on the current device (hopper.hpp says which requests do).
bool takes_hopper(const Request& request);

// How many queries of a request read the items together.
int queries_a_pass(const Request& request);

// Bytes of device memory that select() needs besides its operands and results; depends on sizes and options only.
size_t workspace_bytes(const Request& request);

// Runs on `stream` and waits for it (a list of candidates that overflowed needs another pass, which the host must start), so the
// results are complete on return. The current device must be the one that holds everything. `workspace` is 256-byte aligned.
Status select(const Request& request, const Result& result, void* workspace, size_t bytes, cudaStream_t stream);

// The same without a wait. Once the stream has come to the end of what was started, `ended` says of its flags whether the results hold;
// until then everything that was given must stay. A status with an error or a fault: nothing is under way.
Status start(const Request& request, const Result& result, void* workspace, size_t bytes, cudaStream_t stream, const Flags& flags);

// `started`: what start() returned. Nothing where a list overflowed or bounds left too much, so that select() must search once more.
std::optional<Status> ended(const Status& started, const Flags& flags);

}  // namespace dqe::cuda
