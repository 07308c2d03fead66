// The exported functions of libnvinfer and libnvonnxparser, and the two things that a ctypes callback cannot do:
// name a C++ type, and return a struct. All else is Python: `abi.py` makes the objects, `behaviour.py` says what they do.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <typeinfo>

namespace {

struct Shape {
    std::int32_t rank;
    std::int64_t sizes[8];
};

// pybind11 asks an object that it is given for its type. TensorRT's own are hidden ones too, so the static type is taken.
struct Hidden {
    virtual ~Hidden() = default;
};

[[noreturn]] void missing(const char *function) {
    std::fprintf(stderr, "the TensorRT mock has no %s\n", function);
    std::abort();
}

}  // namespace

extern "C" {

struct {
    void *(*create)(const char *kind, void *first, void *logger, std::int32_t version);
    void (*tensor_shape)(void *self, const char *tensor, Shape *shape);
    void (*profile_shape)(void *self, const char *tensor, std::int32_t profile, std::int32_t which, Shape *shape);
} mock_hooks;

const void *mock_type() { return &typeid(Hidden); }

Shape mock_tensor_shape(void *self, const char *tensor) {
    Shape shape{};
    mock_hooks.tensor_shape(self, tensor, &shape);
    return shape;
}

Shape mock_profile_shape(void *self, const char *tensor, std::int32_t profile, std::int32_t which) {
    Shape shape{};
    mock_hooks.profile_shape(self, tensor, profile, which, &shape);
    return shape;
}

void *createInferBuilder_INTERNAL(void *logger, std::int32_t version) {
    return mock_hooks.create("IBuilder", nullptr, logger, version);
}
void *createInferRuntime_INTERNAL(void *logger, std::int32_t version) {
    return mock_hooks.create("IRuntime", nullptr, logger, version);
}
void *createNvOnnxParser_INTERNAL(void *network, void *logger, std::int32_t) {
    return mock_hooks.create("IParser", network, logger, 0);
}

void *createInferRefitter_INTERNAL() { missing("refitter"); }
void *createNvOnnxParserRefitter_INTERNAL() { missing("parser refitter"); }
void *getBuilderPluginRegistry() { missing("plugin registry of a builder"); }
void *getPluginRegistry() { missing("plugin registry"); }
int getNvOnnxParserVersion() { missing("parser version"); }
bool initLibNvInferPlugins() { missing("plugins"); }
}
