// Test only: the instructions of ptx.hpp on the CPU, with the lane layouts of the PTX ISA manual.
//
// mma.m16n8k16, .f16: with g = lane / 4 and t = lane % 4 ("groupID", "threadID_in_group"),
//   A element i of 8: row g + 8 * (i is 2, 3, 6 or 7), column 2t + (i & 1) + 8 * (i >= 4)
//   B element i of 4: row 2t + (i & 1) + 8 * (i >= 2), column g
//   C element i of 4: row g + 8 * (i >= 2), column 2t + (i & 1)
// Products of f16 are exact; their sum is rounded to f32 once per instruction here, where hardware truncates in between.
#pragma once

namespace dqe::cuda {

inline float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 31 ? (fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                            : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                           : std::ldexp(static_cast<float>(fraction), -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return 0x7FFF;
    if (magnitude >= 65520.0f) return sign | 0x7C00;
    if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));  // subnormal or zero
    int exponent;
    std::frexp(magnitude, &exponent);                                          // magnitude in [2^(exponent-1), 2^exponent)
    const float steps = std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // 1024 to 2048; the latter carries into the exponent
    return sign | static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(steps) - 1024);
}

inline const float* half_table() {
    static const std::vector<float> table = [] {
        std::vector<float> values(65536);
        for (int bits = 0; bits < 65536; ++bits) values[bits] = half_to_float(static_cast<uint16_t>(bits));
        return values;
    }();
    return table.data();
}

template <typename T>
uint32_t shared_address(Shared<T> pointer) {
    return static_cast<uint32_t>(pointer.offset);
}

inline void cp_async(uint32_t to, const unsigned char* from, int size, int bytes) {
    using namespace emulation;
    if (bytes < 0 || bytes > size || to % size || reinterpret_cast<uintptr_t>(from) % size) fail("cp.async: misaligned or bad size");
    touch(to, size, true);
    for (int word = 0; word < size / 4; ++word) machine.words[to / 4 + word].in_flight = true;
    machine.fibers[machine.current].groups.back().push_back({to, from, size, bytes});
}
inline void cp_async_16(uint32_t to, const unsigned char* from, int bytes) { cp_async(to, from, 16, bytes); }
template <int Size>
void cp_async_short(uint32_t to, const unsigned char* from, int bytes) {
    cp_async(to, from, Size, bytes);
}
inline uint32_t middle_of(uint32_t low, uint32_t high) { return low >> 16 | high << 16; }

inline void cp_async_commit() { emulation::machine.fibers[emulation::machine.current].groups.emplace_back(); }

template <int Pending>
void cp_async_wait() {
    using namespace emulation;
    auto& groups = machine.fibers[machine.current].groups;
    while (static_cast<int>(groups.size()) - 1 > Pending + machine.stale_reads) {
        for (const Copy& copy : groups.front()) {
            for (int word = 0; word < copy.size / 4; ++word) machine.words[copy.to / 4 + word].in_flight = false;
            touch(copy.to, copy.size, true);
            std::memset(&machine.shared[copy.to], 0, copy.size);
            if (copy.bytes) std::memcpy(&machine.shared[copy.to], copy.from, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

inline void await_previous() {
    using namespace emulation;
    const bool forgets = machine.early && machine.early_launches == std::abs(machine.unawaited) &&
                         (machine.unawaited > 0 || machine.current >= machine.producers_from);
    if (machine.early && !machine.released && !forgets) wait_at(machine.ahead);
}
inline void admit_next() {}

inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t row) {
    using namespace emulation;
    struct Lane {
        size_t row;
        uint32_t* out;
    } mine = {row, out};
    if (row % 16) fail("ldmatrix: misaligned row");
    touch(row, 16, false);
    collective<Lane>(1000001, mine, [](Lane*(&lanes)[kLanes]) {
        for (int lane = 0; lane < kLanes; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix)
                std::memcpy(&lanes[lane]->out[matrix], &machine.shared[lanes[8 * matrix + lane / 4]->row + 4 * (lane % 4)], 4);
    });
}

inline void not_known(int&) {}

inline float nan_max(float a, float b) { return (a > b || a != a) ? a : b; }

inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using namespace emulation;
    struct Lane {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } mine = {c, a, {b0, b1}};
    collective<Lane>(1000002, mine, [](Lane*(&lanes)[kLanes]) {
        static float left[16][16], right[8][16];
        const float* table = half_table();
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 8; ++i)
                left[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = table[lanes[lane]->a[i / 2] >> 16 * (i % 2) & 0xFFFF];
            for (int i = 0; i < 4; ++i) right[g][2 * t + i % 2 + 8 * (i / 2)] = table[lanes[lane]->b[i / 2] >> 16 * (i % 2) & 0xFFFF];
        }
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = (2 * (lane % 4) + i % 2 + machine.wrong_lanes) % 8;
                double sum = lanes[lane]->c[i];
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[column][k];
                lanes[lane]->c[i] = static_cast<float>(sum);
            }
    });
}

// m16n8k32, .s8: A byte i of 16: row g + 8 * (i / 4 is odd), column 4t + i % 4 + 16 * (i >= 8); B byte i of 8: row 4t + i % 4 + 16 * (i >=
// 4), column g; C as above.
inline void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using namespace emulation;
    struct Lane {
        int* c;
        const uint32_t* a;
        uint32_t b[2];
    } mine = {c, a, {b0, b1}};
    collective<Lane>(1000003, mine, [](Lane*(&lanes)[kLanes]) {
        static int8_t left[16][32], right[8][32];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 16; ++i)
                left[g + 8 * (i / 4 % 2)][4 * t + i % 4 + 16 * (i / 8)] = static_cast<int8_t>(lanes[lane]->a[i / 4] >> 8 * (i % 4));
            for (int i = 0; i < 8; ++i) right[g][4 * t + i % 4 + 16 * (i / 4)] = static_cast<int8_t>(lanes[lane]->b[i / 4] >> 8 * (i % 4));
        }
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = (2 * (lane % 4) + i % 2 + machine.wrong_lanes) % 8;
                for (int k = 0; k < 32; ++k) lanes[lane]->c[i] += left[row][k] * right[column][k];
            }
    });
}

}  // namespace dqe::cuda
