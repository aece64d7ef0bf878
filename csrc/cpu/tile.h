// A tile of output pixels in L1: what all maps of the plan read of them.
#pragma once

#include "rows.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
inline constexpr T kLog2E = T(1.44269504088896340736);

// Pixel arrays are [.., kTilePixels], pixels fastest, row after row of `columns` vectors. Lanes past the width of the
// image hold finite logits; their `exists` is 0, which makes all they would add exactly zero.
template <typename T>
struct Tile {
  int64_t rows = 0;     // output rows, at most kTileRows
  int64_t columns = 0;  // vectors a row
  int64_t index = 0;    // of the tile in its block of columns
  int num_classes;
  T* scales;           // P [L, C, ..]
  T* exponentials;     // E [L, C, ..], exp(P - largest of the pixel)
  T* margins;          // [L, ..], the largest logit minus that of the label's class, in units of log2
  T* own;              // [L, ..], P of the label's class
  T* one_hot;          // [C, ..], y_c times the weight of the pixel for Dice, which is 1 in plain problems
  T* exists;           // [..], 1 or 0
  bool whole = false;  // every pixel exists and has weight 1 for Dice
  // In problems that are not plain, and null in others:
  T* weight;            // [..], of the pixel for Dice, 0 past the width
  T* share;             // [C, ..], t_c times the weight of the pixel for cross-entropy
  T* total;             // [..] the sum of shares; under sigmoid [C, ..], the weight for cross-entropy times 1 - y_c
  T* factor;            // [L, C, ..], bounded factors of products, where a map has them
  T* slope;             // [L, C, ..], their derivatives
  T* map;               // [C, ..], the logits of one map in units of log2, then their exponentials
  T* top;               // [..], the largest of those logits
  T* margin;            // [..], that minus the one of the label's class
  T* sum;               // [..], of the exponentials
  T* inverse;           // [..], 1 / sum, 0 in lanes past the width
  T* attention;         // [2 L, ..], awf weights of one subset, then the same times log2(e)
  RowBlend<T>* blends;  // [L, kTileRows]

  Tile(const Problem<T>& problem, Arena& arena) : num_classes(static_cast<int>(problem.num_classes)) {
    const int64_t L = problem.num_scales, C = problem.num_classes, N = kTilePixels;
    scales = arena.take_zeros<T>(L * C * N);
    exponentials = arena.take<T>(L * C * N);
    margins = arena.take<T>(L * N);
    own = arena.take<T>(L * N);
    one_hot = arena.take_zeros<T>(C * N);
    exists = arena.take<T>(N);
    const bool is_plain = problem.kind == Kind::kPlain;
    weight = is_plain ? nullptr : arena.take<T>(N);
    // One array less in the first-level cache where both would hold the same numbers.
    const bool is_hot = problem.kind == Kind::kSigmoid && problem.target.uniform && problem.target.weighted_ce;
    share = is_plain ? nullptr : is_hot ? one_hot : arena.take_zeros<T>(C * N);
    total = is_plain ? nullptr : arena.take<T>(problem.kind == Kind::kSigmoid ? C * N : N);
    factor = problem.bounded ? arena.take<T>(L * C * N) : nullptr;
    slope = problem.bounded ? arena.take<T>(L * C * N) : nullptr;
    map = arena.take<T>(C * N);
    top = arena.take<T>(N);
    margin = arena.take<T>(N);
    sum = arena.take<T>(N);
    inverse = arena.take<T>(N);
    attention = arena.take<T>(2 * L * N);
    blends = arena.take<RowBlend<T>>(L * kTileRows);
  }

  // The same for `count` of the rows, from `first` on. What is made of pixels (P, E, maps) is kept for one part at a
  // time, so that it lies in the first-level cache.
  Tile part(int64_t first, int64_t count) const {
    Tile part = *this;
    part.rows = count;
    part.one_hot += offset(first);
    part.exists += offset(first);
    if (weight != nullptr) {
      part.weight += offset(first);
      part.share += offset(first);
      part.total += offset(first);
    }
    part.blends += first;
    return part;
  }

  int64_t offset(int64_t row) const { return row * columns * kWidth<T>; }
  int64_t pixels() const { return rows * columns * kWidth<T>; }
  T* scale(int64_t l) const { return scales + l * num_classes * kTilePixels; }  // [C, ..]
  // What products multiply: P, or its bounded factor.
  T* multiplier(int64_t l) const { return factor == nullptr ? scale(l) : factor + l * num_classes * kTilePixels; }
  T* exponential(int64_t l) const { return exponentials + l * num_classes * kTilePixels; }
  const RowBlend<T>& blend(int64_t l, int64_t row) const { return blends[l * kTileRows + row]; }
};

// P of one scale for all rows of the tile: two enlarged native rows, blended.
template <typename T>
void load_scale(const Tile<T>& tile, const ScaleRows<T>& source, int64_t l) {
  constexpr int64_t kV = kWidth<T>;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const RowBlend<T>& blend = tile.blend(l, r);
    const T *lo = source.raw(blend.lo_slot, tile.index), *hi = source.raw(blend.hi_slot, tile.index);
    const Vec<T> lo_weight(blend.lo_weight), hi_weight(blend.hi_weight);
    T* to = tile.scale(l) + r * tile.columns * kV;
    for (int c = 0; c < tile.num_classes; ++c) {
      for (int64_t v = 0; v < tile.columns * kV; v += kV) {
        Vec<T> value = Vec<T>::loadu(lo + c * kTileWidth + v);
        if (!blend.single) {
          value = at::vec::fmadd(value, lo_weight, hi_weight * Vec<T>::loadu(hi + c * kTileWidth + v));
        }
        value.store(to + c * kTilePixels + v);
      }
    }
  }
}

// Bounded factors P / sqrt(1 + (P / kMulBound)^2) of one scale, and their derivatives (1 + (P / kMulBound)^2)^(-3/2).
template <typename T>
void bound_scale(const Tile<T>& tile, int64_t l) {
  constexpr int64_t kV = kWidth<T>;
  constexpr T kFar = T(1e15);
  const T* from = tile.scale(l);
  T *factor = tile.multiplier(l), *slope = tile.slope + l * tile.num_classes * kTilePixels;
  for (int64_t c = 0; c < tile.num_classes; ++c) {
    for (int64_t p = c * kTilePixels, end = p + tile.pixels(); p < end; p += kV) {
      // Far out the factor no longer changes, and squares would overflow. 0 * x: infinity is no number here, as in
      // plain PyTorch.
      const Vec<T> x = Vec<T>::loadu(from + p), near = at::vec::clamp(x, Vec<T>(-kFar), Vec<T>(kFar));
      const Vec<T> scaled = near * Vec<T>(static_cast<T>(1 / kMulBound));
      const Vec<T> inverse = Vec<T>(1) / at::vec::fmadd(scaled, scaled, Vec<T>(1)).sqrt();
      at::vec::fmadd(near, inverse, x * Vec<T>(0)).store(factor + p);
      (inverse * inverse * inverse).store(slope + p);
    }
  }
}

// own[l] = P_l of the label's class. Chosen, not multiplied by one_hot: an infinite logit of another class is none of
// its business.
template <typename T>
void load_own(const Tile<T>& tile, int64_t l) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t pixels = tile.pixels(), end = tile.num_classes * kTilePixels;
  const T *from = tile.scale(l), *one_hot = tile.one_hot;
  T* to = tile.own + l * kTilePixels;
  for (int64_t p = 0; p < pixels; p += kV) {
    Vec<T> own(0);
    for (int64_t at = p; at < end; at += kTilePixels) {
      own = Vec<T>::blendv(own, Vec<T>::loadu(from + at), Vec<T>::loadu(one_hot + at) > Vec<T>(0));
    }
    own.store(to + p);
  }
}

// One object a scale, made in place: kernels use no containers, so that no code of the standard library is compiled
// for a capability the machine may lack.
template <typename Item>
class PerScale {
 public:
  template <typename T>
  PerScale(const Problem<T>& problem, Arena& arena) : count_(problem.num_scales) {
    for (int64_t l = 0; l < count_; ++l) new (at(l)) Item(problem, l, arena);
  }
  Item& operator[](int64_t l) { return *at(l); }
  int64_t size() const { return count_; }

 private:
  Item* at(int64_t l) { return reinterpret_cast<Item*>(storage_) + l; }
  alignas(Item) unsigned char storage_[sizeof(Item) * kMaxScales];
  int64_t count_;
};

// Where a tile lies in the image.
struct Place {
  int64_t batch, z, y, x;
  int64_t count;  // pixels of a row that exist
};

// Walk the output rows of a unit: for every z, for every block of columns, tiles from top to bottom. `rows` may be the
// rows of a pass or rows with gradients. For every group of output rows `group(y, y_end)` is called once, then
// `per_tile(place)` for each of its tiles.
template <typename T, typename Rows, typename Start, typename Group, typename Work, typename Finish>
void sweep(const Problem<T>& problem, const Unit& unit, Tile<T>& tile, PerScale<Rows>& rows, const Start& start,
           const Group& group, const Work& per_tile, const Finish& finish) {
  constexpr int64_t kV = kWidth<T>;
  for (int64_t z = unit.z_begin; z < unit.z_end; ++z) {
    for (int64_t x = 0; x < problem.width; x += problem.block_width) {
      const int64_t width = problem.width - x < problem.block_width ? problem.width - x : problem.block_width;
      const int64_t tiles = (width + kTileWidth - 1) / kTileWidth;
      start(z, x, tiles);
      for (int64_t y = unit.y_begin; y < unit.y_end; y += kTileRows) {
        tile.rows = unit.y_end - y < kTileRows ? unit.y_end - y : kTileRows;
        group(y, y + tile.rows);
        for (int64_t l = 0; l < rows.size(); ++l) {
          for (int64_t r = 0; problem.scales[l].used && r < tile.rows; ++r) {
            tile.blends[l * kTileRows + r] = rows[l].blend(y + r);
          }
        }
        for (tile.index = 0; tile.index < tiles; ++tile.index) {
          const int64_t at = tile.index * kTileWidth, count = width - at < kTileWidth ? width - at : kTileWidth;
          tile.columns = (count + kV - 1) / kV;
          per_tile(Place{unit.batch, z, y, x + at, count});
        }
      }
      finish();
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
