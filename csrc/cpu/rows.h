// Native rows of one scale, enlarged along x: the logits themselves, and what `cat` and `awf` project them to.
//
// A 1x1 convolution commutes with interpolation, so projections are made from the small native rows, once for all
// the output rows that a native row serves. What is left to do for an output row is to blend two enlarged rows.
#pragma once

#include "arena.h"
#include "products.h"
#include "strided.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Where an output row finds the two enlarged rows it blends.
template <typename T>
struct RowBlend {
  int64_t lo_slot, hi_slot;
  T lo_weight, hi_weight;
  bool single;  // hi_weight is 0
};

// A ring of `slots` enlarged rows. Row n lies in slot n % slots; slots suffice for all output rows of a tile.
// Layout [slots, tiles, rows, kTileWidth], so that what a tile reads of a slot is contiguous.
template <typename T>
class ScaleRows {
 public:
  ScaleRows(const Problem<T>& problem, int64_t index, Arena& arena)
      : problem_(problem), scale_(problem.scales[index]), C_(problem.num_classes) {
    if (!scale_.used) return;
    constexpr int64_t kV = kWidth<T>;
    const int64_t most_tiles = problem.block_width / kTileWidth;
    raw_ = arena.take_zeros<T>(scale_.slots * most_tiles * C_ * kTileWidth);
    projected_ = arena.take_zeros<T>(scale_.slots * most_tiles * scale_.rows_padded * kTileWidth);
    held_ = arena.take<int64_t>(scale_.slots);
    pitch_ = (widest_segment() + kV - 1) / kV * kV + kV;  // a vector may be read from any column
    native_ = arena.take_zeros<T>(C_ * pitch_);
    other_ = arena.take<T>(pitch_);
    small_ = arena.take_zeros<T>(scale_.rows_padded * pitch_);
  }

  // Begin a block of output columns [x, x + tiles * kTileWidth) of one z.
  void start(int64_t batch, int64_t z, int64_t x, int64_t tiles) {
    if (!scale_.used) return;
    batch_ = batch;
    z_ = z;
    x_ = x;
    tiles_ = tiles;
    count_ = problem_.width - x < tiles * kTileWidth ? problem_.width - x : tiles * kTileWidth;
    first_ = scale_.axis[2].lo[x];
    segment_ = scale_.axis[2].hi[x + count_ - 1] - first_ + 1;
    for (int64_t i = 0; i < scale_.slots; ++i) held_[i] = -1;
  }

  // Have all rows that output rows [y, y_end) blend. `evict(slot, row)` is called before a row is given up.
  template <typename Evict, typename Enter>
  void ensure(int64_t y, int64_t y_end, const Evict& evict, const Enter& enter) {
    if (!scale_.used) return;
    for (int64_t n = scale_.axis[1].lo[y]; n <= scale_.axis[1].hi[y_end - 1]; ++n) {
      const int64_t slot = n % scale_.slots;
      if (held_[slot] == n) continue;
      if (held_[slot] >= 0) evict(slot, held_[slot]);
      held_[slot] = n;
      fill(slot, n);
      enter(slot);
    }
  }

  // Give up all rows.
  template <typename Evict>
  void finish(const Evict& evict) {
    if (!scale_.used) return;
    for (int64_t slot = 0; slot < scale_.slots; ++slot) {
      if (held_[slot] >= 0) evict(slot, held_[slot]);
      held_[slot] = -1;
    }
  }

  RowBlend<T> blend(int64_t y) const {
    const Axis<T>& axis = scale_.axis[1];
    const T frac = axis.frac[y];
    return {axis.lo[y] % scale_.slots, axis.hi[y] % scale_.slots, T(1) - frac, frac, frac == T(0)};
  }

  // [C, kTileWidth] and [rows_padded, kTileWidth] of one slot and tile.
  T* raw(int64_t slot, int64_t tile) const { return raw_ + (slot * tiles_ + tile) * C_ * kTileWidth; }
  T* projected(int64_t slot, int64_t tile) const {
    return projected_ + (slot * tiles_ + tile) * scale_.rows_padded * kTileWidth;
  }

  const Scale<T>& scale() const { return scale_; }
  int64_t z() const { return z_; }
  int64_t x() const { return x_; }
  int64_t count() const { return count_; }  // output columns of the block that exist
  int64_t tiles() const { return tiles_; }
  int64_t first_column() const { return first_; }  // native columns of the block, as the axis counts them
  int64_t num_columns() const { return segment_; }

 private:
  int64_t widest_segment() const {
    const Axis<T>& axis = scale_.axis[2];
    int64_t widest = 1;
    for (int64_t x = 0; x < problem_.width; x += problem_.block_width) {
      const int64_t end = x + problem_.block_width < problem_.width ? x + problem_.block_width : problem_.width;
      const int64_t here = axis.hi[end - 1] - axis.lo[x] + 1;
      widest = here > widest ? here : widest;
    }
    return widest;
  }

  void fill(int64_t slot, int64_t n) {
    constexpr int64_t kV = kWidth<T>;
    load_native(n);
    const bool same_width = scale_.size[2] == problem_.width;
    const int64_t native_vectors = (segment_ + kV - 1) / kV, vectors = kTileWidth / kV;
    if (same_width) {
      copy_to_tiles(slot);
    } else {
      enlarge(native_, C_, raw(slot, 0));
    }
    if (scale_.rows == 0) return;
    if (!same_width && native_vectors < tiles_ * vectors) {
      multiply<false>(scale_.projection_log2, scale_.rows_padded, C_, 1, C_, native_, pitch_, native_vectors, small_,
                      pitch_);
      enlarge(small_, scale_.rows_padded, projected(slot, 0));
    } else {
      for (int64_t t = 0; t < tiles_; ++t) {
        multiply<false>(scale_.projection_log2, scale_.rows_padded, C_, 1, C_, raw(slot, t), kTileWidth, vectors,
                        projected(slot, t), kTileWidth);
      }
    }
  }

  // Native row n of the segment, already interpolated along z.
  void load_native(int64_t n) {
    constexpr int64_t kV = kWidth<T>;
    const Axis<T>& axis = scale_.axis[0];
    const T frac = axis.frac[z_];
    for (int64_t c = 0; c < C_; ++c) {
      T* to = native_ + c * pitch_;
      load_logits(scale_, problem_.logit_type, batch_, c, axis.lo[z_], n, first_, segment_, to);
      if (frac == T(0)) continue;
      load_logits(scale_, problem_.logit_type, batch_, c, axis.hi[z_], n, first_, segment_, other_);
      const Vec<T> a(T(1) - frac), b(frac);
      for (int64_t i = 0; i < segment_; i += kV) {  // the pitch leaves room for a whole last vector
        at::vec::fmadd(a, Vec<T>::loadu(to + i), b * Vec<T>::loadu(other_ + i)).store(to + i);
      }
    }
  }

  void copy_to_tiles(int64_t slot) {
    for (int64_t t = 0; t < tiles_; ++t) {
      const int64_t left = count_ - t * kTileWidth, n = left < kTileWidth ? left : kTileWidth;
      for (int64_t c = 0; c < C_; ++c) {
        T* to = raw(slot, t) + c * kTileWidth;
        std::memcpy(to, native_ + c * pitch_ + t * kTileWidth, sizeof(T) * n);
        std::memset(to + n, 0, sizeof(T) * (kTileWidth - n));
      }
    }
  }

  // from [rows, pitch] -> to [tiles, rows, kTileWidth], interpolated along x.
  void enlarge(const T* from, int64_t rows, T* to) const {
    constexpr int64_t kV = kWidth<T>;
    using VecIndex = Vec<typename Axis<T>::Index>;
    const Axis<T>& axis = scale_.axis[2];
    for (int64_t i = 0; i < tiles_ * kTileWidth; i += kV) {
      const int64_t x = x_ + i < x_ + count_ ? x_ + i : x_ + count_ - 1;  // past the end: the last pixel again
      const int64_t base = axis.lo[x], last = axis.hi[x + kV - 1];
      const VecIndex offset(static_cast<typename Axis<T>::Index>(base));
      const VecIndex lo = VecIndex::loadu(axis.lo + x) - offset, hi = VecIndex::loadu(axis.hi + x) - offset;
      const Vec<T> frac = Vec<T>::loadu(axis.frac + x), rest = Vec<T>(1) - frac;
      const T* source = from + (base - first_);
      T* out = to + (i / kTileWidth * rows) * kTileWidth + i % kTileWidth;
      if (last - base < kV) {
        for (int64_t r = 0; r < rows; ++r) {
          const Vec<T> a = pick(source + r * pitch_, lo), b = pick(source + r * pitch_, hi);
          at::vec::fmadd(a, rest, share_of(b, frac)).store(out + r * kTileWidth);
        }
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          const Vec<T> a = at::vec::gather<sizeof(T)>(source + r * pitch_, lo);
          const Vec<T> b = at::vec::gather<sizeof(T)>(source + r * pitch_, hi);
          at::vec::fmadd(a, rest, share_of(b, frac)).store(out + r * kTileWidth);
        }
      }
    }
  }

  // b * frac, and 0 where frac is 0: there b is a, which may be infinite.
  static Vec<T> share_of(const Vec<T>& b, const Vec<T>& frac) { return (b * frac) & (frac != Vec<T>(0)); }

  const Problem<T>& problem_;
  const Scale<T>& scale_;
  int64_t C_;
  T* raw_ = nullptr;
  T* projected_ = nullptr;
  int64_t* held_ = nullptr;  // [slots], the native row in each
  T* native_ = nullptr;      // [C, pitch]
  T* other_ = nullptr;       // [pitch]
  T* small_ = nullptr;       // [rows_padded, pitch]
  int64_t pitch_ = 0;
  int64_t batch_ = 0, z_ = 0, x_ = 0, tiles_ = 0, count_ = 0;
  int64_t first_ = 0, segment_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
