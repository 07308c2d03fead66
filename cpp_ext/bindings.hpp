// What the adapters of both files of bindings share: checked arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "prefix.hpp"

namespace dqe::cpu {

namespace nb = nanobind;

template <typename T, int Rank>
using Array = nb::ndarray<T, nb::ndim<Rank>, nb::device::cpu, nb::c_contig>;
using Items = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu, nb::c_contig>;

inline std::string text(std::initializer_list<int64_t> shape) {
    std::string all = "(";
    for (const int64_t size : shape) all += std::to_string(size) + ",";
    return all + ")";
}

// Raises ValueError unless `array` has this shape.
template <typename AnyArray>
void expect(const char* name, const AnyArray& array, std::initializer_list<int64_t> shape) {
    size_t axis = 0;
    for (const int64_t size : shape)
        if (static_cast<int64_t>(array.shape(axis++)) != size)
            throw std::invalid_argument(std::string(name) + ": expected shape " + text(shape));
}

// How many "one per processor" is, the caller decides.
inline void expect_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
}

inline bool is_half(const Items& items) {
    const bool half = items.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    if (!half && items.dtype() != nb::dtype<float>()) throw nb::type_error("items: expected float32 or float16");
    return half;
}

inline void check_prefix_width(int64_t width, int64_t whole) {
    if (width < kPrefixRows || width % kPrefixRows || width > whole || width > kMostPrefix)
        throw std::invalid_argument("prefix: expected a multiple of 16 numbers, at most those of a token and 1024");
}

// Defines what copies items for searches: codes, prefixes, lists.
void define_builders(nb::module_& m);

}  // namespace dqe::cpu
