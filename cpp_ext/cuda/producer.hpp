// Bringing items to a block: which columns a tile has, and the asynchronous copies of their chunks into the ring.
#pragma once

#include "ptx.hpp"
#include "scan.hpp"

namespace dqe::cuda {

// A place in a block's sequence of chunks.
struct Position {
    int64_t tile, step;
    int chunk;
};

// The columns of one step of one item tile.
struct ColumnTile {
    int64_t tile;
    int64_t first_item;  // or first place in `gather`
    int items;
    int64_t first_token;  // of the item, where an item takes several steps
    int columns;

    __device__ ColumnTile(const Scan& scan, int64_t tile, int64_t step) : tile(tile) {
        first_item = tile * scan.stride * scan.items_per_tile;
        const int64_t end = scan.gather ? scan.gathered : scan.size;
        items = static_cast<int>(end - first_item < scan.items_per_tile ? end - first_item : scan.items_per_tile);
        first_token = step * kColumns;
        const int64_t tokens = scan.tokens - first_token;
        columns = scan.tokens > kColumns ? static_cast<int>(tokens < kColumns ? tokens : kColumns) : items * static_cast<int>(scan.tokens);
    }

    // Where the D coordinates of column c begin.
    __device__ const unsigned char* column(const Scan& scan, int c, int element_bytes) const {
        int64_t token = first_item * scan.tokens + first_token + c;
        if (scan.gather) {
            const int item = scan.tokens > kColumns ? 0 : c / static_cast<int>(scan.tokens);
            const int64_t id = scan.gather[int64_t{blockIdx.x} * scan.gather_pitch + first_item + item];
            token = id * scan.tokens + first_token + (c - item * scan.tokens);
        }
        return scan.items + token * scan.width * element_bytes;
    }
};

// Start bringing the first `bytes` of 16 bytes of a row that begins at a multiple of `Unit` (8 or 4) bytes, and zeros after them.
template <int Unit>
__device__ void copy_in_units(uint32_t to, const unsigned char* from, int bytes) {
#pragma unroll
    for (int at = 0; at < 16; at += Unit) {
        const int left = bytes - at < 0 ? 0 : bytes - at < Unit ? bytes - at : Unit;
        cp_async_short<Unit>(to + at, left ? from + at : from, left);
    }
}

// 16 bytes at an address that is a multiple of 2, `bytes` of them real. Rows of an odd number of f16 begin in the middle of a word
// every other time: words are read, and shifted. [start, end): what may be read at all.
__device__ inline uint4 load_halves(const unsigned char* from, int bytes, const unsigned char* start, const unsigned char* end) {
    uint32_t words[5] = {};
    const bool shifted = reinterpret_cast<uintptr_t>(from) % 4 != 0;
    const unsigned char* word = from - (shifted ? 2 : 0);
    if (bytes == 16 && word >= start && word + (shifted ? 20 : 16) <= end) {
#pragma unroll
        for (int i = 0; i < 5; ++i)
            if (i < 4 || shifted) words[i] = reinterpret_cast<const uint32_t*>(word)[i];
        if (!shifted) return {words[0], words[1], words[2], words[3]};
        return {middle_of(words[0], words[1]), middle_of(words[1], words[2]), middle_of(words[2], words[3]), middle_of(words[3], words[4])};
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i * 2 < bytes) words[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[i]} << 16 * (i % 2);
    return {words[0], words[1], words[2], words[3]};
}

// Brings a block's chunks into the stages of the ring, one after another; beyond the columns and beyond D they are filled with
// zeros. A thread copies one 16-byte unit of every 32nd row. Where it reads is a pointer that moves on by a chunk; only a new
// column tile costs an address calculation, unless rows are gathered or not aligned.
//
// Plain: rows are aligned and not gathered, and an item takes one step. The code for anything else is then not there.
template <int ElementBytes, bool Plain>
class Producer {
  public:
    __device__ explicit Producer(const Scan& scan) : scan_(scan), at_{int64_t{blockIdx.y}, 0, 0} {
        row_hop_ = kHop * scan.width * ElementBytes;
        to_ = chunk_offset(threadIdx.x / 8, threadIdx.x % 8);
        seek();
    }

    // Whether there is a chunk still to bring.
    __device__ bool more() const { return at_.tile < scan_.tiles; }

    __device__ int chunk() const { return at_.chunk; }

    // Start bringing the chunk into the stage at byte `stage` of shared memory.
    __device__ void load(int stage) const {
        if constexpr (!Plain)
            if (!contiguous()) return load_elsewhere(stage + to_);
        const uint32_t address = shared_address(shared_memory()) + stage + to_;
        const unsigned char* from = from_;
#pragma unroll
        for (int j = 0; j < kColumns / kHop; ++j, from += row_hop_) {
            const int bytes = left_ > 0 && j * kHop < columns_ ? 16 : 0;
            cp_async_16(address + j * kHop * kChunkBytes, from, bytes);  // 32 rows on, the swizzle is the same; of no bytes nothing is read
        }
    }

    __device__ void advance() {
        from_ += kChunkBytes, left_ -= kChunkBytes;
        if (++at_.chunk < scan_.chunks) return;
        at_.chunk = 0;
        if (Plain || ++at_.step == scan_.steps) at_.step = 0, at_.tile += gridDim.y;
        seek();
    }

  private:
    static constexpr int kHop = kThreads / 8;

    __device__ bool contiguous() const { return Plain || (scan_.unit == 16 && !scan_.gather); }

    __device__ void seek() {
        if (!contiguous() || !more()) return;
        const ColumnTile tile(scan_, at_.tile, at_.step);
        const int64_t token = tile.first_item * scan_.tokens + tile.first_token + threadIdx.x / 8;
        columns_ = tile.columns - static_cast<int>(threadIdx.x / 8);
        left_ = static_cast<int>(scan_.width) * ElementBytes - static_cast<int>(threadIdx.x % 8 * 16);
        from_ = scan_.items + token * scan_.width * ElementBytes + threadIdx.x % 8 * 16;
    }

    __device__ void load_elsewhere(int to) const {
        const ColumnTile tile(scan_, at_.tile, at_.step);
        const int64_t offset = int64_t{at_.chunk} * kChunkBytes + threadIdx.x % 8 * 16;
        const int64_t left = scan_.width * ElementBytes - offset;
        const int inside = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
        const unsigned char* end = scan_.items + scan_.size * scan_.tokens * scan_.width * ElementBytes;
        const uint32_t shared = shared_address(shared_memory());
        for (int row = threadIdx.x / 8; row < kColumns; row += kHop, to += kHop * kChunkBytes) {
            const int bytes = row < tile.columns ? inside : 0;
            const unsigned char* from = bytes ? tile.column(scan_, row, ElementBytes) + offset : scan_.items;
            switch (scan_.unit) {
                case 16:
                    cp_async_16(shared + to, from, bytes);
                    break;
                case 8:
                    copy_in_units<8>(shared + to, from, bytes);
                    break;
                case 4:
                    copy_in_units<4>(shared + to, from, bytes);
                    break;
                default:
                    store_uint4(shared_memory() + to, load_halves(from, bytes, scan_.items, end));
            }
        }
    }

    const Scan& scan_;
    Position at_;
    const unsigned char* from_ = nullptr;
    int64_t row_hop_;
    int to_;                      // its place in a stage
    int columns_ = 0, left_ = 0;  // of the tile, from its first row on; bytes of the row, from its unit on
};

}  // namespace dqe::cuda
