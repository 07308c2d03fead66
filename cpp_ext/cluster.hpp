// k-means in two levels over a few components of tokens: which list (lists.hpp) each token goes to. Nothing is proved here, and nothing
// need be: whatever list a token is in, the bounds hold.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.hpp"
#include "tiles.hpp"

namespace dqe::cpu {

// Consecutive items: (count, tokens, width) float32, or float16 where `half`.
struct TokenSource {
    const void* data;
    int64_t count;
    bool half;
};

// The directions of some tokens, each the place of a token in all sources: unit vectors (count, width). `known`: whether it has one, of a
// length between 1e-36 and 1e36; where it has none, zeros are written.
void gather_directions(const TokenSource* sources, int64_t source_count, int64_t tokens, int64_t width, const int64_t* rows, int64_t count,
                       float* directions, uint8_t* known, int threads);

// The components of (count, width) points along (axes, width) directions: (count, axes).
void project(const float* points, int64_t count, int64_t width, const float* axes, int64_t axis_count, float* along, int threads);

// The direction of each group's sum, (groups, width); of a group whose members cancel, or that has none, the first axis.
void mean_directions(const float* points, int64_t count, int64_t width, const uint32_t* group_of, int64_t groups, float* directions,
                     int threads);

// Groups of points, (begins[groups], width), each to be divided among centres of its own: those of group g are offsets[g] to
// offsets[g + 1] - 1, at least one. Lloyd's iterations begin with some of the group's points, and look at `most` of them for each centre at
// most; a centre that no point is nearest to stays, and a group without points keeps the centres that it comes with. Then writes the
// nearest centre of each point, counted from the group's first.
void cluster(const float* points, int64_t width, const int64_t* begins, int64_t groups, const int64_t* offsets, int64_t most, int rounds,
             float* centres, uint32_t* nearest, int threads);

// Centres in two levels, at least one leaf for each root, in the first components of directions.
struct TokenTree {
    int64_t axis_count, root_count;
    const float* axes;       // (axis_count, width)
    const float* roots;      // (root_count, axis_count)
    const float* leaves;     // (offsets[root_count], axis_count)
    const int64_t* offsets;  // (root_count + 1,): the first leaf of each root
};

// Centres in 8 bits, and the codes of points that go with them. With ĉ = codes / u of a centre c and p̂ = (codes - 64) / v of a point p,
// <p̂, ĉ> - |ĉ|² / 2 is greatest for the centre nearest to p. Times u v, it is the product of the codes and a whole number of the centre's
// own.
class Centres {
  public:
    // `largest`: of the coordinates, those of points beyond it count as it.
    Centres(const TileKernels& kernels, const float* centres, int64_t count, int64_t width, float largest);

    CodedCentres coded() const { return {codes_.data(), offsets_.data(), panels_}; }

  private:
    AlignedVector<int8_t> codes_;
    AlignedVector<int32_t> offsets_;
    int64_t panels_;
};

// Finds the leaves of tokens, some thousand at a time, so that a root's leaves stay in the first-level cache for some of them.
class Assigner {
  public:
    static constexpr int64_t kSome = 2048;

    struct Scratch {
        AlignedVector<float> along, factors;
        std::vector<uint8_t> points, sorted;
        std::vector<uint32_t> roots, order, leaves;  // leaves[at] is of token order[at], in the order of roots
        std::vector<int64_t> ends, next;
    };

    Assigner(const TokenTree& tree, int64_t width);

    // The leaf nearest to the direction of each of (count, width) tokens, among those of the nearest root; any for one without a direction.
    void assign(const float* tokens, int64_t count, Scratch& scratch) const;

  private:
    const TileKernels& kernels_;
    const TokenTree tree_;
    const int64_t width_;
    const float largest_;
    AlignedVector<float> axes_;
    Centres roots_;
    std::vector<Centres> leaves_;
};

// The leaf of each of (count, width) tokens.
void assign_tokens(const float* rows, int64_t count, int64_t width, const TokenTree& tree, uint32_t* assigned, int threads);

}  // namespace dqe::cpu
