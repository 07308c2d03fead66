// Upper bounds of many scores by matrix tiles (AMX): 16 rows times 16 queries times 64 codes an instruction, eight times the rate
// of 8-bit dot products in vectors. Included by bounds_impl.hpp, within its namespaces; the panels of coded queries already have
// the layout that the second operand wants, and rows of codes are the first operand as they lie.
//
// Tile registers are named by literals in GCC's intrinsics, so nothing here is a template over them.

// Sums 0 to 3, rows 4 and 5, queries 6 and 7; all of 16 rows of 64 bytes.
struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
alignas(64) const TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16},
};

constexpr int kTileRows = 16, kTileBytes = 64, kBlockRows = 32, kVisitedRows = 4;

// A block of 32 rows and a panel of queries on their way to sums[row][lane]; each step takes the next 64 codes of all.
template <int VECTORS>
class Product {
  public:
    static constexpr int kLanes = VECTORS * kVector;

    // The sums start at the offsets: a stride of zero loads them into every row.
    Product(const CodedRows& rows, int64_t first, const CodedQueries& queries)
        : codes_(rows.codes + first * rows.width), width_(rows.width), panel_(queries.codes) {
        _tile_loadd(0, queries.offsets, 0);
        _tile_loadd(2, queries.offsets, 0);
        if constexpr (VECTORS == 2) {
            _tile_loadd(1, queries.offsets + kVector, 0);
            _tile_loadd(3, queries.offsets + kVector, 0);
        }
    }

    void step() {
        _tile_loadd(4, codes_, width_);
        _tile_loadd(5, codes_ + kTileRows * width_, width_);
        _tile_loadd(6, panel_, kPanelRow);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(2, 5, 6);
        if constexpr (VECTORS == 2) {
            _tile_loadd(7, panel_ + kTileBytes, kPanelRow);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
        codes_ += kTileBytes;
        panel_ += kTileBytes / 4 * kPanelRow;
    }

    void finish(int32_t* sums) const {
        _tile_stored(0, sums, kPanelRow);
        _tile_stored(2, sums + kTileRows * kLanes, kPanelRow);
        if constexpr (VECTORS == 2) {
            _tile_stored(1, sums + kVector, kPanelRow);
            _tile_stored(3, sums + kTileRows * kLanes + kVector, kPanelRow);
        }
    }

  private:
    static constexpr int64_t kPanelRow = 4 * kLanes;  // bytes: four codes of each lane; as many as a row of sums

    const uint8_t* codes_;
    int64_t width_;
    const int8_t* panel_;
};

// Rows `from` to `to` of a block whose sums are there.
template <int VECTORS, typename Visit>
inline void visit_sums(const int32_t* sums, int64_t first, int from, int to, Visit& visit) {
    for (int r = from; r < to; r += kVisitedRows) {
        Vector dots[kVisitedRows][VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < kVisitedRows; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) dots[i][v] = _mm512_cvtepi32_ps(_mm512_load_si512(sums + ((r + i) * VECTORS + v) * kVector));
        visit(first + r, dots);
    }
}

// While the matrix unit works on a block, the vector units visit the one before, a few rows a step.
template <int VECTORS, typename Visit>
void visit_panel(const CodedRows& rows, const CodedQueries& queries, Visit& visit) {
    alignas(64) int32_t sums[2][kBlockRows * VECTORS * kVector];
    const int64_t blocks = rows.count / kBlockRows, steps = rows.width / kTileBytes;
    const int share = static_cast<int>((kBlockRows / kVisitedRows + steps - 1) / steps * kVisitedRows);
    _tile_loadconfig(&kTileConfig);
    for (int64_t block = 0; block <= blocks; ++block) {
        const int64_t first = (block - 1) * kBlockRows;  // of the one before
        const int32_t* before = sums[(block + 1) % 2];
        int done = block == 0 ? kBlockRows : 0;
        if (block < blocks) {
            Product<VECTORS> product(rows, block * kBlockRows, queries);
            const uint8_t* next_block = rows.codes + (block + 1) * kBlockRows * rows.width;
            for (int64_t step = 0; step < steps; ++step) {
                product.step();
                // In the order of memory: sixteen rows side by side are streams that no hardware prefetcher follows.
                for (int line = 0; line < kBlockRows; ++line)
                    __builtin_prefetch(next_block + (step * kBlockRows + line) * kTileBytes, 0, 2);
                const int next = done + share < kBlockRows ? done + share : kBlockRows;
                visit_sums<VECTORS>(before, first, done, next, visit);
                done = next;
            }
            product.finish(sums[block % 2]);
        }
        visit_sums<VECTORS>(before, first, done, kBlockRows, visit);
    }
    _tile_release();  // a thread with tiles in use costs more to switch, and keeps its core from sleeping deeply
    visit_groups<VECTORS>(rows, blocks * kBlockRows, queries, visit);
}
