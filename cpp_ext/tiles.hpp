// Kernels on one tile of items: scores, upper bounds of scores, and where they reach a threshold. The same source
// (tiles_impl.hpp) is compiled once per instruction set; the driver (sweep.cpp) picks a table at run time.
//
// A tile is some consecutive rows (tokens of items). Many queries are scored in panels: the lanes of vector registers are
// queries, so that an item's numbers are broadcast and rows need no packing, no padding and no transposition. A few queries
// are scored row by row: lanes run along D. The order in which a score is added up depends on D only, never on the tile, the
// panel or the thread.
#pragma once

#include <cstdint>

namespace dqe::cpu {

// Rows scored or bounded: `count` rows of `width` entries each.
struct Rows {
    const float* data;
    int64_t count, width;
};

// Quantised rows (screen.hpp): unsigned codes = signed code + 128, `width` a multiple of kCodeAlignment.
struct CodedRows {
    const uint8_t* codes;
    const float *scales, *errors, *norms;
    int64_t count, width;
};

constexpr int64_t kCodeAlignment = 64;

// Products of so many codes go into two sums of 16 bits where kernels have `short_sums`: numbers 0, 1, 4, 5 and so on, and the others.
constexpr int64_t kSumCodes = 16;

// What the bound of a score needs to know of a quantised query (screen.hpp).
struct CodedQueries {
    const int8_t* codes;     // panel: [width / 4][lanes][4]; rows: [query][width]
    const int32_t* offsets;  // -128 * (sum of the query's codes)
    const float *scales, *norms, *errors;
};

constexpr int kUniforms = 16;

// Memory that will be wanted next, and which of how many panels asks for its share of it.
struct Ahead {
    const char* from;
    int64_t row_bytes;  // for each row that is scored now
    int64_t panel, panels;
};

// A pair of a tile, row * lanes + lane, and the upper bound of its score.
struct Bounded {
    uint32_t position;
    float bound;
};

// A vector c and its codes: ĉ = scale * codes (screen.hpp).
struct Quantised {
    float scale;
    double norm, coded_norm, error;  // |c|, |ĉ|, |c - ĉ|
};

struct Products {
    double with_other, with_itself;
};

constexpr float kPointCode = 63.0f;  // the largest of a point's numbers, before 64 is added: two products with a centre's fit 16 bits

// Centres in panels of `wide`: codes [panel][width / 4][wide][4] and offsets [panel][wide]; cluster.hpp says of what.
struct CodedCentres {
    const int8_t* codes;
    const int32_t* offsets;
    int64_t panels;
};

constexpr int64_t kPrefixRows = 16;  // of a block of prefixes (prefix.hpp)

struct PrefixHeader {
    float scale, error, norm, rest_unit;
    uint16_t rests[kPrefixRows];
    float unused[4];
};
static_assert(sizeof(PrefixHeader) == 64);

// What was coded in one scale: sums of squares of each row's numbers, of what its codes stand for, and of what they leave.
struct PrefixSums {
    float scale;
    double whole[kPrefixRows], coded[kPrefixRows], left[kPrefixRows];
};

// A query's codes in the rotated basis, -128 times their sum, and its numbers (prefix.hpp).
struct PrefixQuery {
    const int8_t* codes;
    int32_t offset;
    float scale, norm, error, rest;
};

// Beyond this norm, products and partial sums could overflow float32; below it, none of what enters a bound or a score can.
constexpr double kLargestNorm = 0x1p60;

struct TileKernels {
    const char* name;
    int wide, narrow;      // lanes of a panel; narrow is for what is left over
    int max_row_queries;   // dot_rows and bound_rows take up to so many queries
    int screened_queries;  // up to so many, bounds first are faster than scores at once
    bool short_sums;       // panels of queries are to be coded for sums of 16 bits (encode_query in screen.hpp)

    // scores[row * lanes + lane] = <row, query>. `panel` is [width][lanes]; lanes is wide or narrow.
    void (*dot_panel)(const Rows& rows, const float* panel, int lanes, const Ahead& ahead, float* scores);
    // scores[query * stride + row] = <row, query>. `queries` is [count][width].
    void (*dot_rows)(const Rows& rows, const float* queries, int count, float* scores, int64_t stride);

    // Pairs whose upper bound is not below their lane's threshold, NaN included, in ascending order of position; returns how many.
    // `reached` has room for all. No bound is ever stored. Null where it would be slower than dot_panel.
    int64_t (*find_bounded)(const CodedRows& rows, const CodedQueries& queries, int lanes, const float* thresholds, Bounded* reached);
    // scores[row * lanes + lane]: the middle of what the codes leave open, 0 for vectors without a bound. Null where find_bounded is.
    void (*estimate_panel)(const CodedRows& rows, const CodedQueries& queries, int lanes, float* scores);
    // bounds[query * stride + row]: upper bounds of scores, NaN where there is none.
    void (*bound_rows)(const CodedRows& rows, const CodedQueries& queries, int count, float* bounds, int64_t stride);

    // The same of one query and of rows whose codes lie in blocks of kPrefixRows, [width / 4][row][4], the last filled up: nothing is added
    // across lanes.
    void (*bound_blocks_of_codes)(const CodedRows& rows, const CodedQueries& query, float* bounds);

    // (items * tokens, lanes) to (items, lanes): the maximum of each item's tokens, NaN if any token's is. In place if best is
    // scores.
    void (*max_over_tokens)(const float* scores, int64_t items, int64_t tokens, int lanes, float* best);

    // Positions p (ascending) of the entries that are not below their lane's threshold, NaN included; returns how many.
    // `size` is a multiple of lanes. `positions` has room for size + lanes entries.
    int64_t (*find)(const float* scores, int64_t size, int lanes, const float* thresholds, uint32_t* positions);

    // IEEE half precision to single precision, exact.
    void (*widen)(const uint16_t* half, int64_t size, float* single);

    // Codes of a vector, the largest of them `most_code`, at most 127, before rounding; all norms NaN and codes zero where an entry is not
    // finite, or the norm above kLargestNorm.
    Quantised (*quantise)(const float* vector, int64_t width, float most_code, int8_t* codes);

    // <vector, other> and <vector, vector> in double precision.
    Products (*products)(const float* vector, const float* other, int64_t width);

    // Codes of a block of prefixes, (kPrefixRows, width) numbers, in one scale; zeros get the code 128.
    void (*encode_prefix)(const float* rows, int64_t width, uint8_t* codes, PrefixSums* sums);

    // Rows of `count` blocks of prefixes whose upper bound is not below the threshold, NaN included, ascending; returns how many.
    int64_t (*find_prefixed)(const uint8_t* blocks, int64_t count, int64_t width, const PrefixQuery& query, float threshold,
                             uint32_t* positions);

    // The upper bounds of all rows of `count` blocks, NaN where there is none.
    void (*bound_prefixed)(const uint8_t* blocks, int64_t count, int64_t width, const PrefixQuery& query, float* bounds);

    // The lists (lists.hpp), ascending, that may have a token that scores `threshold` or more; returns how many. `products` are upper
    // bounds of the query's products with their directions, `norm` of its norm; `slack` is Reach's.
    int64_t (*find_lists)(const float* products, const float* widest, const float* longest, int64_t count, float norm, float slack,
                          float threshold, uint32_t* lists);

    // For each of `count` points, `width` codes below 128 each, the position of the centre of the greatest product plus offset; the first
    // of equals.
    void (*nearest)(const uint8_t* points, int64_t count, int64_t width, const CodedCentres& centres, uint32_t* nearest);

    // Codes of `count` points, rows of `stride` numbers: round(factor * number) + kPointCode + 1, within 1 and 127; what is no number is
    // any.
    void (*code_points)(const float* numbers, int64_t count, int64_t stride, int64_t width, const float* factors, uint8_t* codes,
                        int64_t size);

    // <row, row> of each row, added up in float32.
    void (*squares)(const Rows& rows, float* squares);

    // u(seed, query, item) of philox.hpp for `count` items, at most kUniforms.
    void (*uniforms)(uint64_t seed, uint64_t query, const uint32_t* items, int count, double* u);

    // A loop of multiply-adds that stays in registers, to measure the processor with; returns how many numbers were multiplied
    // and added. `sink` has two entries: a factor, which the result replaces, and a summand.
    int64_t (*multiply_add_loop)(int64_t steps, float* sink);
};

// The instruction sets that this build has and this processor runs, best first; ends with a null pointer.
const TileKernels* const* available_tile_kernels();

}  // namespace dqe::cpu
