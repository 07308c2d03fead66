// Test only: the instructions of hopper_ptx.hpp on the CPU, as the PTX ISA manual describes them.
//
// Copies of boxes are under way until the scheduler completes them: at once, as late as possible or at random (see `order`), in any
// order. Products read shared memory from when they are issued until their warp waits for them. Caught, beside what host_emulation.hpp
// catches: a copy into a place that a product still reads or another copy fills, products of bytes that have not arrived or were never
// written, warps of a warpgroup that do not issue the same products, a product without a fence, a barrier used before it is published.
// Deadlocks end the run. Accumulators are NaN while products are under way.
//
// Under the 128-byte swizzle bits 7 to 9 of an address flip its bits 4 to 6.
#pragma once

#include <map>
#include <utility>

namespace emulation {

// Faults that tests plant, so that they see them found.
enum HopperFault {
    kNoFault,
    kWrongParity,      // a wait for the other phase
    kMissingArrive,    // of the last warp
    kNoSwizzle,        // copies lie row by row
    kShortCount,       // a barrier expects 16 bytes less
    kEarlyRelease,     // a wait for products that does not wait
    kWrongStride,      // descriptors' rows lie 512 bytes apart in place of 1,024
    kWrongFragment,    // accumulators of the neighbouring columns
    kForgottenFence,   // none before products
    kLateInitialised,  // barriers are not published
    kProducerAhead,    // the producer does not wait for empty stages
    kOtherNumbers,     // boxes of numbers are those of the next columns
    kNumbersReleased,  // a stage is given back once products have read it, though its numbers have not been read
    kTowardsZero,      // no fault: sums are rounded otherwise than those of mma
};

struct HopperBarrier {
    Gate gate;  // its generation less 1 is the phase
    int expected = 0, pending = 0;
    int64_t bytes = 0;
    bool published = false;

    void settle() {
        if (pending == 0 && bytes == 0) ++gate.generation, pending = expected;
    }
};

struct TensorBox {
    const unsigned char* base;
    int64_t width, rows, pitch;  // bytes of a row, and from row to row
    int element, box_bytes, box_rows;
    bool swizzle;
};

struct BoxCopy {
    uint32_t to, barrier;
    TensorBox box;
    int x, y;
};

// A word of the accumulators: f32 of halves, a 32-bit integer of codes.
using SumWord [[gnu::may_alias]] = uint32_t;

struct WarpProduct {
    uint64_t a, b;
    bool codes;
    int columns;
    SumWord* d[kLanes];  // (columns / 8, 4)
    SumWord before[kLanes][64];
    bool saved;
};

struct HopperWarp {
    std::vector<std::vector<WarpProduct>> groups = {{}};
    std::vector<std::pair<uint64_t, uint64_t>> issued;
    bool fenced = false;
    uint32_t waited = 0;      // the barrier last waited for
    bool given_back = false;  // its stage already
};

struct HopperUnit {
    int fault = kNoFault;
    std::map<uint32_t, HopperBarrier> barriers;
    std::vector<BoxCopy> copies;
    std::vector<HopperWarp> warps;
    std::vector<int> readers;  // products under way, per word of shared memory
    uint64_t drawn = 0;
};
inline HopperUnit hopper;

inline HopperBarrier& barrier_at(uint32_t address) {
    const auto found = hopper.barriers.find(address);
    if (found == hopper.barriers.end()) fail("mbarrier: not initialised");
    if (!found->second.published) fail("mbarrier: used before it is published");
    return found->second;
}

// Where the byte lies that a plain layout has at an address.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void complete(const BoxCopy& copy) {
    const TensorBox& box = copy.box;
    for (int row = 0; row < box.box_rows; ++row)
        for (int byte = 0; byte < box.box_bytes; byte += box.element) {
            const int64_t x = int64_t{copy.x} * box.element + byte, y = int64_t{copy.y} + row;
            const uint32_t plain = copy.to + row * box.box_bytes + byte;
            unsigned char* to = &machine.shared[!box.swizzle || hopper.fault == kNoSwizzle ? plain : swizzled(plain)];
            const bool inside = x < box.width && y < box.rows;
            inside ? std::memcpy(to, box.base + y * box.pitch + x, box.element) : std::memset(to, 0, box.element);
        }
    const uint32_t bytes = box.box_rows * box.box_bytes;
    for (uint32_t at = copy.to / 4; at < (copy.to + bytes) / 4; ++at) machine.words[at].in_flight = false, machine.words[at].written = true;
    HopperBarrier& barrier = hopper.barriers.at(copy.barrier);
    barrier.bytes -= bytes;
    barrier.settle();
}

inline void complete_one() {
    const size_t which = machine.order > 1 ? scrambled(machine.order + ++hopper.drawn) % hopper.copies.size() : 0;
    const BoxCopy copy = hopper.copies[which];
    hopper.copies.erase(hopper.copies.begin() + which);
    complete(copy);
}

// What happens besides the threads, once each has had its turn. `idle`: none could move. False where there is nothing to do.
inline bool background(bool idle) {
    if (hopper.copies.empty()) return false;
    if (machine.order != 0 || idle) complete_one();
    return true;
}

inline void begin_block(int warps) {
    hopper.barriers.clear(), hopper.copies.clear();
    hopper.warps.assign(warps, {});
    hopper.readers.assign(machine.words.size(), 0);
    machine.background = background;
}

// Byte `k` along D of row `row` of an operand, by its descriptor: K-major, 128-byte swizzle.
inline uint32_t operand_byte(uint64_t descriptor, int row, int k) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    return swizzled(start + row / 8 * (hopper.fault == kWrongStride ? stride / 2 : stride) + row % 8 * 128 + k);
}

// Calls `visit(word)` for what the warp's product reads: 16 rows of a, all of b, 32 bytes each.
template <typename Visit>
void each_word(const WarpProduct& product, int warp, const Visit& visit) {
    for (int row = 0; row < 16 + product.columns; ++row)
        for (int k = 0; k < 32; k += 4) {
            const uint32_t byte = row < 16 ? operand_byte(product.a, warp % 4 * 16 + row, k) : operand_byte(product.b, row - 16, k);
            if (byte + 4 > machine.shared.size()) fail("wgmma: a descriptor points beyond shared memory");
            visit(byte / 4);
        }
}

// `Element` of the operands, `Sum` in accumulators, added up in `Wide`.
template <typename Element, typename Sum, typename Wide, typename Value>
void execute(WarpProduct& product, int warp, const Value& value) {
    constexpr int kDepth = 32 / sizeof(Element);
    static Wide left[16][kDepth], right[kDepth][128];  // right: by k, then column
    const auto element = [&](uint32_t byte) {
        Element bits;
        std::memcpy(&bits, &machine.shared[byte], sizeof bits);
        return static_cast<Wide>(value(bits));
    };
    for (int k = 0; k < kDepth; ++k) {
        const int byte = k * static_cast<int>(sizeof(Element));
        for (int row = 0; row < 16; ++row) left[row][k] = element(operand_byte(product.a, warp % 4 * 16 + row, byte));
        for (int column = 0; column < product.columns; ++column) right[k][column] = element(operand_byte(product.b, column, byte));
    }
    for (int row = 0; row < 16; ++row) {
        // Lane 4 (row % 8) + t has columns 8n + 2t and the next, in d[n][2 (row / 8)] and the next.
        const auto place = [&](SumWord* lanes, int column) -> SumWord& {
            const int wrong = hopper.fault == kWrongFragment;
            return lanes[(column / 8 + wrong) % (product.columns / 8) * 4 + row / 8 * 2 + column % 2];
        };
        const auto lane_of = [&](int column) { return row % 8 * 4 + column / 2 % 4; };
        Wide sum[128];
        for (int column = 0; column < product.columns; ++column) {
            const int lane = lane_of(column);
            Sum before;
            std::memcpy(&before, &place(product.saved ? product.before[lane] : product.d[lane], column), sizeof before);
            sum[column] = before;
        }
        for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < product.columns; ++column) sum[column] += left[row][k] * right[k][column];
        for (int column = 0; column < product.columns; ++column) {
            Sum after = static_cast<Sum>(sum[column]);
            if constexpr (std::is_floating_point_v<Sum>)
                if (hopper.fault == kTowardsZero && std::fabs(after) > std::fabs(sum[column])) after = std::nextafter(after, Sum{0});
            std::memcpy(&place(product.d[lane_of(column)], column), &after, sizeof after);
        }
    }
}

inline void execute(WarpProduct& product, int warp) {
    each_word(product, warp, [](uint32_t word) {
        if (machine.words[word].in_flight || !machine.words[word].written) fail("wgmma: read bytes that had not arrived");
        --hopper.readers[word];
    });
    if (product.codes) return execute<int8_t, int, int>(product, warp, [](int8_t code) { return code; });
    execute<uint16_t, float, double>(product, warp, [table = dqe::cuda::half_table()](uint16_t bits) { return table[bits]; });
}

}  // namespace emulation

namespace dqe::cuda {

using TensorMap = emulation::TensorBox;

inline cudaError_t encode(TensorMap* map, const void* rows, int64_t width, int64_t count, int64_t pitch, int element, int box_bytes,
                          int box_rows, bool swizzle) {
    if (reinterpret_cast<uintptr_t>(rows) % 16 || pitch % 16 || pitch < width || box_rows > 256 || box_bytes / element > 256 || width < 1 ||
        count < 1 || (swizzle && box_bytes > 128))
        return cudaErrorInvalidValue;
    *map = {static_cast<const unsigned char*>(rows), width, count, pitch, element, box_bytes, box_rows, swizzle};
    return cudaSuccess;
}

inline cudaError_t encode_chunks(TensorMap* map, const void* rows, int64_t width, int64_t count, int box_rows) {
    return encode(map, rows, width, count, width, 1, kChunkBytes, box_rows, true);
}

inline cudaError_t encode_numbers(TensorMap* map, const float* rows, int64_t width, int64_t count, int64_t pitch, int box_rows) {
    return encode(map, rows, width * 4, count, pitch, 4, kColumns * 4, box_rows, false);
}

inline void mbarrier_init(uint32_t barrier, int arrivals) {
    if (!emulation::machine.background) emulation::begin_block(static_cast<int>(emulation::machine.warps.size()));  // its first
    if (barrier % 8 || barrier + 8 > emulation::machine.shared.size()) emulation::fail("mbarrier: bad address");
    emulation::HopperBarrier made;
    made.expected = made.pending = arrivals;
    emulation::hopper.barriers[barrier] = made;
}

inline void mbarrier_publish() {
    if (emulation::hopper.fault == emulation::kLateInitialised) return;
    for (auto& [address, barrier] : emulation::hopper.barriers) barrier.published = true;
}

inline void arrive_at(uint32_t barrier) {
    using namespace emulation;
    HopperBarrier& at = barrier_at(barrier);
    if (--at.pending < 0) fail("mbarrier: more arrivals than expected");
    at.settle();
}

inline void mbarrier_arrive(uint32_t barrier) {
    using namespace emulation;
    HopperWarp& warp = hopper.warps[machine.current / kLanes];
    if (hopper.fault == kMissingArrive && machine.current / kLanes == kWarps - 1) return;
    if (std::exchange(warp.given_back, false)) return;
    arrive_at(barrier);
}

inline void mbarrier_expect(uint32_t barrier, int bytes) {
    using namespace emulation;
    barrier_at(barrier).bytes += bytes - (hopper.fault == kShortCount ? 16 : 0);
    arrive_at(barrier);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    using namespace emulation;
    HopperBarrier& at = barrier_at(barrier);
    hopper.warps[machine.current / kLanes].waited = barrier;
    if (hopper.fault == kWrongParity) parity ^= 1;
    if (hopper.fault == kProducerAhead && machine.current >= kThreads) return;
    while ((at.gate.generation - 1) % 2 == parity) wait_at(at.gate);
}

inline void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
    using namespace emulation;
    barrier_at(barrier);
    const uint32_t bytes = map.box_rows * map.box_bytes;
    if (to % (map.swizzle ? 1024 : 128) || to + bytes > machine.shared.size() || x < 0 || y < 0) fail("copy of a box: bad address");
    for (uint32_t at = to / 4; at < (to + bytes) / 4; ++at) {
        if (machine.words[at].in_flight) fail("copy of a box: another copy is under way there");
        if (hopper.readers[at]) fail("copy of a box: a product still reads there");
        machine.words[at].in_flight = true;
    }
    if (hopper.fault == kOtherNumbers && !map.swizzle) x += kColumns;
    hopper.copies.push_back({to, barrier, map, x, y});
    if (machine.order == 1) complete_one();
}

template <int Registers>
void lower_registers() {}
template <int Registers>
void raise_registers() {}

// Once for a warp, whose lanes all come here.
template <typename Act>
void by_warp(int line, const Act& act) {
    int mine = 0;
    emulation::collective<int>(
        line, mine, [&](int*(&)[emulation::kLanes]) { act(emulation::hopper.warps[emulation::machine.current / emulation::kLanes]); });
}

inline void wgmma_fence() {
    if (emulation::hopper.fault == emulation::kForgottenFence) return;
    by_warp(1000003, [](emulation::HopperWarp& warp) { warp.fenced = true; });
}

inline void wgmma_commit() {
    by_warp(1000004, [](emulation::HopperWarp& warp) { warp.groups.emplace_back(), warp.fenced = false; });
}

template <int Pending>
void wgmma_wait() {
    by_warp(1000005, [](emulation::HopperWarp& warp) {
        using namespace emulation;
        const size_t left = hopper.fault == kEarlyRelease ? Pending + 2 : Pending + 1;
        while (warp.groups.size() > left) {
            for (WarpProduct& product : warp.groups.front()) execute(product, machine.current / kLanes);
            warp.groups.erase(warp.groups.begin());
        }
        if (Pending == 0 && hopper.fault == kNumbersReleased) {
            const size_t stages = (hopper.barriers.size() - 1) / 2;
            arrive_at(warp.waited + static_cast<uint32_t>(stages * 8));
            warp.given_back = true;
        }
    });
}

inline void wgmma_settled(float&) {}
inline void wgmma_settled(int&) {}

// Start a product. Until it is waited for, accumulators are worse than any sum of codes, or NaN.
inline void start_product(bool codes, int columns, emulation::SumWord* d, uint64_t a, uint64_t b, bool add) {
    using namespace emulation;
    struct Lane {
        SumWord* d;
        uint64_t a, b;
        bool add;
    } mine = {d, a, b, add};
    collective<Lane>(1000006, mine, [codes, columns](Lane*(&lanes)[kLanes]) {
        const int index = machine.current / kLanes;
        const uint32_t unknown = codes ? 0x80000001 : 0x7FC00000;
        HopperWarp& warp = hopper.warps[index];
        if (!warp.fenced) fail("wgmma: no fence before it");
        WarpProduct product = {lanes[0]->a, lanes[0]->b, codes, columns, {}, {}, true};
        for (const Lane* lane : lanes)
            if (lane->a != product.a || lane->b != product.b || lane->add != lanes[0]->add) fail("wgmma: lanes do not agree");
        if (product.a >> 62 != 1 || product.b >> 62 != 1 || (product.a >> 49 & 7) || (product.b >> 49 & 7))
            fail("wgmma: a descriptor of another swizzle");
        warp.issued.emplace_back(product.a, product.b);
        for (int other = index / 4 * 4; other < index / 4 * 4 + 4; ++other)
            if (hopper.warps[other].issued.size() >= warp.issued.size() &&
                hopper.warps[other].issued[warp.issued.size() - 1] != warp.issued.back())
                fail("wgmma: the warps of a warpgroup do not agree");
        for (const auto& group : warp.groups)
            for (const WarpProduct& earlier : group) product.saved = product.saved && earlier.d[0] != lanes[0]->d;
        for (int lane = 0; lane < kLanes; ++lane) {
            product.d[lane] = lanes[lane]->d;
            if (!product.saved) continue;  // an earlier product's sums are what this one adds to
            for (int i = 0; i < columns / 2; ++i)
                product.before[lane][i] = lanes[0]->add ? product.d[lane][i] : 0, product.d[lane][i] = unknown;
        }
        if (!product.saved && !lanes[0]->add) fail("wgmma: accumulators cleared while products are under way");
        each_word(product, index, [](uint32_t word) {
            if (machine.words[word].in_flight || !machine.words[word].written) fail("wgmma: reads bytes that have not arrived");
            ++hopper.readers[word];
        });
        warp.groups.back().push_back(product);
    });
}

inline void wgmma_64x128x16(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    start_product(false, 128, reinterpret_cast<emulation::SumWord*>(&d[0][0]), a, b, add);
}

inline void wgmma_64x64x32(int (&d)[8][4], uint64_t a, uint64_t b, bool add) {
    start_product(true, 64, reinterpret_cast<emulation::SumWord*>(&d[0][0]), a, b, add);
}

}  // namespace dqe::cuda
