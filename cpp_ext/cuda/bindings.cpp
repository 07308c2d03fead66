// dqe_engine._kernels_cuda: what Python passes becomes raw pointers here, and CUDA's errors become exceptions. Shapes, dtypes and
// devices are checked in dqe_engine/zones/cuda.py, which alone calls this; what would touch foreign memory is checked here again.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "device_memory.hpp"
#include "search.hpp"
#include "zones.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace dqe::cuda;

namespace {

template <typename Array>
nb::tuple shape_of(const Array& array) {
    nb::list sizes;
    for (size_t axis = 0; axis < array.ndim(); ++axis) sizes.append(array.shape(axis));
    return nb::tuple(sizes);
}

// An array of any framework, imported once, with what Python needs to check it.
struct Operand {
    nb::ndarray<nb::ro> array;

    std::string dtype() const {
        if (array.dtype() == nb::dtype<float>()) return "float32";
        if (array.dtype() == nb::dtype<int64_t>()) return "int64";
        const auto type = array.dtype();
        if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 16 && type.lanes == 1) return "float16";
        return "code " + std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits";
    }
    nb::tuple shape() const { return shape_of(array); }
    bool contiguous() const {
        int64_t expected = 1;
        for (size_t axis = array.ndim(); axis-- > 0;) {
            if (array.shape(axis) != 1 && array.stride(axis) != expected && array.size()) return false;
            expected *= static_cast<int64_t>(array.shape(axis));
        }
        return true;
    }
    bool on_device() const { return array.device_type() == nb::device::cuda::value; }
};

// A result on the device. DLPack capsules can be taken once, so each consumer gets a new one; all share the memory.
struct DeviceArray {
    nb::ndarray<> array;
    Memory* memory;  // the array's owner
};

struct Sizes {
    int64_t batch, size, tokens, width, k, picks;
    bool half_queries, half_items, zones, own_best, ranks;
    int64_t excluded;
    bool screened;
};

// Codes of items, complete when they are made.
struct Codes {
    int64_t size, tokens, width;
    int device;
    Memory memory;
    size_t bytes;

    Codes(const Operand& items, uintptr_t stream_handle)
        : size(static_cast<int64_t>(items.array.shape(0))),
          tokens(items.array.ndim() == 2 ? 1 : static_cast<int64_t>(items.array.shape(1))),
          width(static_cast<int64_t>(items.array.shape(items.array.ndim() - 1))),
          device(items.array.device_id()),
          memory(coded_bytes(size, tokens, width), device, reinterpret_cast<cudaStream_t>(stream_handle)),
          bytes(coded_bytes(size, tokens, width)) {
        const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
        check(encode(items.array.data(), items.dtype() == "float16", size, tokens, width, at(), stream), "encode");
        check(cudaStreamSynchronize(stream), "encode");
    }
    CodedItems at() const { return coded_at(memory.data(), size, tokens, width); }
};

Request request_of(const Sizes& s) {
    Request r = {};
    r.half_queries = s.half_queries, r.half_items = s.half_items;
    r.batch = s.batch, r.size = s.size, r.tokens = s.tokens, r.width = s.width;
    r.k = s.k, r.picks = s.picks;
    r.zones = s.zones, r.ranks = s.ranks;
    r.anchor = s.own_best ? Anchor::best : Anchor::score;
    r.excludes = s.excluded > 0;
    r.screened = s.screened;
    return r;
}

constexpr size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Beside the kernels' own: copies of the exclusions and of anchors that come from the host.
size_t extra_bytes(int64_t batch, int64_t excluded) { return padded((batch + 1) * 8) + padded(excluded * 8) + padded(batch * 8); }

size_t workspace_bytes_of(const Sizes& s) { return workspace_bytes(request_of(s)) + extra_bytes(s.batch, s.excluded); }

nb::dict select_adapter(const Operand& queries, const Operand& items, int64_t k, int64_t picks, bool counts, bool zones, bool ranks,
                        double lo, double hi, int policy, double temperature, uint64_t seed, const Operand* anchor, int64_t first_query,
                        HostIds offsets, HostIds excluded, bool portable, uintptr_t stream_handle, const Operand* workspace, Room& room,
                        const Codes* codes, bool sync) {
    const nb::ndarray<nb::ro>&q = queries.array, &t = items.array;
    if (q.ndim() != 2 || (t.ndim() != 2 && t.ndim() != 3) || !queries.on_device() || !items.on_device() ||
        t.shape(t.ndim() - 1) != q.shape(1))
        throw std::invalid_argument("queries (B, D) and items (N, D) or (N, M, D) on a CUDA device expected");
    if (policy < 0 || policy > 2) throw std::invalid_argument("policy: expected 0, 1 or 2");
    const int64_t batch = static_cast<int64_t>(q.shape(0));
    if (static_cast<int64_t>(offsets.shape(0)) != batch + 1) throw std::invalid_argument("offsets: expected batch + 1 entries");
    if (anchor && (anchor->array.ndim() != 1 || static_cast<int64_t>(anchor->array.shape(0)) != batch))
        throw std::invalid_argument("anchor: expected one entry per query");
    const bool by_id = anchor && anchor->dtype() == "int64";
    const Sizes sizes = {batch,
                         static_cast<int64_t>(t.shape(0)),
                         t.ndim() == 2 ? 1 : static_cast<int64_t>(t.shape(1)),
                         static_cast<int64_t>(q.shape(1)),
                         k,
                         picks,
                         queries.dtype() == "float16",
                         items.dtype() == "float16",
                         zones,
                         !anchor,
                         ranks,
                         static_cast<int64_t>(excluded.shape(0)),
                         codes != nullptr};
    if (codes &&
        (codes->size != sizes.size || codes->tokens != sizes.tokens || codes->width != sizes.width || codes->device != q.device_id()))
        throw std::invalid_argument("codes: of other items");
    Request request = request_of(sizes);
    request.queries = q.data(), request.items = t.data();
    request.portable = portable;
    request.counts = zones && counts;
    request.anchor = by_id ? Anchor::id : anchor ? Anchor::score : Anchor::best;
    request.lo = lo, request.hi = hi;
    request.rule = {static_cast<dqe::Policy>(policy), temperature, seed};
    request.first_query = first_query;
    if (codes) request.coded = codes->at();

    const int device = q.device_id();
    const DeviceGuard guard(device);
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const size_t needed = workspace_bytes_of(sizes), query_bytes = q.nbytes();
    std::unique_ptr<Search> search;
    if (!sync) {
        cudaStreamCaptureStatus captured = cudaStreamCaptureStatusNone;
        check(cudaStreamIsCapturing(stream, &captured), "cudaStreamIsCapturing");
        if (captured != cudaStreamCaptureStatusNone)
            throw std::invalid_argument("stream: is being captured into a graph, whose replays nobody would check; search outside of it");
        search = std::make_unique<Search>(device, stream, padded(query_bytes) + extra_bytes(batch, sizes.excluded));
    }
    std::unique_ptr<Scratch> own;
    std::unique_lock lock(room.mutex, std::defer_lock);
    unsigned char* space = nullptr;
    if (workspace) {
        if (!workspace->on_device() || workspace->array.device_id() != device)
            throw std::invalid_argument("workspace: not on the queries' device");
        if (workspace->array.nbytes() < needed || reinterpret_cast<uintptr_t>(workspace->array.data()) % 256)
            throw std::invalid_argument("workspace: " + std::to_string(workspace->array.nbytes()) + " bytes, expected " +
                                        std::to_string(needed) + " (see workspace_bytes), aligned to 256");
        space = static_cast<unsigned char*>(const_cast<void*>(workspace->array.data()));
    } else if (const size_t most = std::max<size_t>(needed, 1); lock.try_lock()) {
        space = room.of(most, device, stream);
    } else {
        own = std::make_unique<Scratch>(most, device, stream);
        space = own->data();
    }
    unsigned char* const inputs = search ? search->inputs.data() : space;
    size_t taken = 0;
    const auto copy = [&](const void* from, size_t bytes, cudaMemcpyKind kind) {
        unsigned char* to = inputs + taken;
        taken += padded(bytes);
        if (bytes) check(cudaMemcpyAsync(to, from, bytes, kind, stream), "cudaMemcpyAsync");
        return to;
    };
    if (sizes.excluded) {
        request.excluded_start =
            reinterpret_cast<const int64_t*>(copy(offsets.data(), (batch + 1) * sizeof(int64_t), cudaMemcpyHostToDevice));
        request.excluded_ids =
            reinterpret_cast<const int64_t*>(copy(excluded.data(), sizes.excluded * sizeof(int64_t), cudaMemcpyHostToDevice));
    }
    if (search) request.queries = copy(q.data(), query_bytes, cudaMemcpyDeviceToDevice);
    if (anchor) {
        const auto kind = anchor->on_device() ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
        const void* values =
            search || !anchor->on_device() ? copy(anchor->array.data(), anchor->array.nbytes(), kind) : anchor->array.data();
        if (by_id) request.anchor_ids = static_cast<const int64_t*>(values);
        if (!by_id) request.anchor_scores = static_cast<const float*>(values);
    }

    // All results lie in one allocation that lives as long as any of them.
    struct Field {
        const char* name;
        bool wanted, integer;
        size_t rank, columns;
    };
    const size_t rows = static_cast<size_t>(batch), top = static_cast<size_t>(k), chosen = static_cast<size_t>(picks);
    const Field fields[] = {{"scores", true, false, 2, top},
                            {"ids", true, true, 2, top},
                            {"counts", request.counts, true, 2, 3},
                            {"picks", zones && picks, true, 2, chosen},
                            {"pick_scores", zones && picks, false, 2, chosen},
                            {"lo", zones, false, 1, 1},
                            {"hi", zones, false, 1, 1},
                            {"anchor_scores", zones, false, 1, 1}};
    size_t total = 0;
    for (const Field& field : fields)
        if (field.wanted) total += padded(rows * field.columns * (field.integer ? 8 : 4));
    auto slab = std::make_unique<Memory>(total, device, stream);
    unsigned char* free_place = slab->data();
    Memory* const memory = slab.release();
    const nb::capsule owner(memory, [](void* held) noexcept { delete static_cast<Memory*>(held); });
    void* places[8] = {};
    nb::dict out;
    for (int i = 0; i < 8; ++i) {
        const Field& field = fields[i];
        if (!field.wanted) {
            out[field.name] = nb::none();
            continue;
        }
        places[i] = free_place;
        free_place += padded(rows * field.columns * (field.integer ? 8 : 4));
        const size_t shape[2] = {rows, field.columns};
        const auto type = field.integer ? nb::dtype<int64_t>() : nb::dtype<float>();
        out[field.name] =
            nb::cast(DeviceArray{{places[i], field.rank, shape, owner, nullptr, type, nb::device::cuda::value, device}, memory});
    }
    const auto f32 = [&](int i) { return static_cast<float*>(places[i]); };
    const auto i64 = [&](int i) { return static_cast<int64_t*>(places[i]); };
    const Result result = {f32(0), i64(1), i64(2), i64(3), f32(4), f32(5), f32(6), f32(7)};

    if (search) {
        search->request = request, search->result = result;
        search->held = {nb::find(queries), nb::find(items), nb::find(room), nb::borrow(owner)};
        if (anchor) search->held.push_back(nb::find(*anchor));
        if (workspace) search->held.push_back(nb::find(*workspace));
        if (codes) search->held.push_back(nb::find(*codes));
        search->host = {offsets, excluded};
        {
            nb::gil_scoped_release release;
            search->begin(space, workspace_bytes(request));
        }
        if (lock) room.leave(stream);
        search->check_status();
        out["rescored"] = nb::none();
        out["search"] = nb::cast(search.release(), nb::rv_policy::take_ownership);
        return out;
    }
    Status status;
    {
        nb::gil_scoped_release release;
        status = select(request, result, space + taken, workspace_bytes(request), stream);
    }
    check(status.error, "zone selection");
    throw_fault(status.fault);
    out["rescored"] = codes ? nb::cast(status.rescored) : nb::none();
    out["search"] = nb::none();
    return out;
}

}  // namespace

NB_MODULE(_kernels_cuda, m) {
    m.doc() = "CUDA kernels of dqe_engine; called through dqe_engine.zones.cuda.";
    nb::class_<Operand>(m, "Operand")
        .def(
            "__init__", [](Operand* self, nb::ndarray<nb::ro> array) { new (self) Operand{std::move(array)}; }, "array"_a.noconvert())
        .def_prop_ro("shape", &Operand::shape)
        .def_prop_ro("dtype", &Operand::dtype)
        .def_prop_ro("contiguous", &Operand::contiguous)
        .def_prop_ro("on_device", &Operand::on_device)
        .def_prop_ro("device", [](const Operand& self) { return self.array.device_id(); });
    nb::class_<Search>(m, "Search")
        .def("settle", &Search::settle)
        .def_prop_ro("rescored", &Search::rescored)
        .def_prop_ro("repeated", &Search::repeated);
    nb::class_<Room>(m, "Room").def(nb::init<>()).def_ro("bytes", &Room::bytes);
    nb::class_<DeviceArray>(m, "DeviceArray")
        .def_prop_ro("shape", [](const DeviceArray& self) { return shape_of(self.array); })
        .def("__dlpack_device__", [](const DeviceArray& self) { return nb::make_tuple(self.array.device_type(), self.array.device_id()); })
        // Nothing to wait for: the result was complete before it was handed out. It is handed out where it lies, and never copied.
        .def(
            "__dlpack__",
            [](DeviceArray& self, std::optional<int64_t> stream, const nb::kwargs& options) {
                if (options.contains("copy") && nb::borrow(options["copy"]).is(nb::bool_(true)))
                    throw nb::buffer_error("a result is handed out where it lies: ask for no copy");
                if (options.contains("dl_device") && !nb::borrow(options["dl_device"]).is_none() &&
                    !nb::borrow(options["dl_device"]).equal(nb::make_tuple(self.array.device_type(), self.array.device_id())))
                    throw nb::buffer_error("a result is handed out where it lies: ask for no other device");
                self.memory->lend(stream);
                return nb::cast(self.array);
            },
            nb::kw_only(), "stream"_a.none() = nb::none(), "options"_a);
    nb::class_<Codes>(m, "Codes").def(nb::init<const Operand&, uintptr_t>(), "items"_a, "stream"_a).def_ro("bytes", &Codes::bytes);
    // So that what exports an array finds its device current.
    m.def("current_device", [] {
        int device = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        return device;
    });
    m.def("set_device", [](int device) { check(cudaSetDevice(device), "cudaSetDevice"); }, "device"_a);
    m.def("device_count", [] {
        int count = 0;
        if (cudaGetDeviceCount(&count) != cudaSuccess) {  // no driver, or one that is too old: no devices
            cudaGetLastError();
            return 0;
        }
        return count;
    });
    m.def(
        "workspace_bytes",
        [](int64_t batch, int64_t size, int64_t tokens, int64_t width, bool half_queries, bool half_items, int64_t k, int64_t picks,
           bool zones, bool own_best, bool ranks, int64_t excluded, bool screened) {
            return workspace_bytes_of(
                {batch, size, tokens, width, k, picks, half_queries, half_items, zones, own_best, ranks, excluded, screened});
        },
        "batch"_a, "size"_a, "tokens"_a, "width"_a, "half_queries"_a, "half_items"_a, "k"_a, "picks"_a, "zones"_a, "own_best"_a, "ranks"_a,
        "excluded"_a, "screened"_a = false);
    m.def(
        "architecture",  // and how many queries read the items together
        [](const Operand& items, int64_t batch, bool half_queries, bool zones, bool screened, bool own_best, bool ranks, bool excludes) {
            const nb::ndarray<nb::ro>& t = items.array;
            if (t.ndim() != 2 && t.ndim() != 3) throw std::invalid_argument("items: expected 2 or 3 dimensions");
            const auto axis = [&](size_t at) { return static_cast<int64_t>(t.shape(at)); };
            Request request = request_of({batch, axis(0), t.ndim() == 2 ? 1 : axis(1), axis(t.ndim() - 1), !zones, 0, half_queries,
                                          items.dtype() == "float16", zones, own_best, ranks, excludes, screened});
            request.items = t.data();
            const DeviceGuard guard(t.device_id());
            return nb::make_tuple(takes_hopper(request) ? "sm_90a" : "sm_80", queries_a_pass(request));
        },
        "items"_a, "batch"_a, "half_queries"_a, "zones"_a, "screened"_a, "own_best"_a = true, "ranks"_a = false, "excludes"_a = false);
    m.def("select", &select_adapter, "queries"_a, "items"_a, nb::kw_only(), "k"_a, "picks"_a, "counts"_a, "zones"_a, "ranks"_a, "lo"_a,
          "hi"_a, "policy"_a, "temperature"_a, "seed"_a, "anchor"_a.none(), "first_query"_a, "offsets"_a.noconvert(),
          "excluded"_a.noconvert(), "portable"_a, "stream"_a, "workspace"_a.none(), "room"_a, "codes"_a.none() = nb::none(),
          "sync"_a = true);
}
