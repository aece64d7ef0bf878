// Gradients of enlarged native rows, collected while output rows pass by and carried to native resolution once a row
// is complete. Memory private to the unit, nothing scattered by more than one thread: no atomics.
#pragma once

#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// What output rows [first, first + count) of a tile give to one native row.
template <typename T>
struct RowSpread {
  int64_t slot;
  bool fresh;  // nothing has been given to it yet
  int first, count;
  T weight[kTileRows];
};

template <typename T>
class RowGrads : public ScaleRows<T> {
 public:
  RowGrads(const Problem<T>& problem, int64_t index, Arena& arena)
      : ScaleRows<T>(problem, index, arena), problem_(problem), index_(index), C_(problem.num_classes) {
    const Scale<T>& scale = this->scale();
    if (!scale.used) return;
    constexpr int64_t kV = kWidth<T>;
    const int64_t most_tiles = problem.block_width / kTileWidth;
    raw_grad_ = arena.take_zeros<T>(scale.slots * most_tiles * C_ * kTileWidth);
    projected_grad_ = arena.take_zeros<T>(scale.slots * most_tiles * scale.rows_padded * kTileWidth);
    entered_ = arena.take<int64_t>(scale.slots);
    class_pitch_ = (C_ + kV - 1) / kV * kV;
    narrow_ = scale.identity ? nullptr : arena.take<T>(scale.axis[2].kept * class_pitch_);
    const int64_t columns = OuterSums<T>::padded(C_ + 1);
    outer_ = {scale.rows_padded, columns, arena.take_zeros<T>(scale.rows_padded * columns)};
    constant_ = arena.take_zeros<T>(2 * kTileWidth);  // a row of zeros, a row of ones
    column_ = arena.take<const T*>(columns);
    step_ = arena.take<int64_t>(columns);
    if (constant_ == nullptr) return;
    for (int64_t i = 0; i < kTileWidth; ++i) constant_[kTileWidth + i] = T(1);
  }

  // `d` [rows, C + 1] takes the gradient of the projection, and of what is added to its result.
  void start(const Unit& unit, int64_t z, int64_t x, int64_t tiles, double* d) {
    unit_ = &unit;
    total_ = d;
    ScaleRows<T>::start(unit.batch, z, x, tiles);
  }

  // Make room for the gradients of all rows that output rows [y, y_end) blend.
  void ensure(int64_t y, int64_t y_end) {
    num_spreads_ = 0;
    const auto enter = [&](int64_t slot) { entered_[num_entered_++] = slot; };
    num_entered_ = 0;
    ScaleRows<T>::ensure(y, y_end, [&](int64_t slot, int64_t n) { flush(slot, n); }, enter);
    for (int64_t r = 0; this->scale().used && r < y_end - y; ++r) {
      const RowBlend<T> blend = this->blend(y + r);
      add_spread(blend.lo_slot, r, blend.lo_weight);
      if (!blend.single) add_spread(blend.hi_slot, r, blend.hi_weight);
    }
    for (int64_t i = 0; i < num_entered_; ++i) start_slot(entered_[i]);
  }

  void finish() {
    ScaleRows<T>::finish([&](int64_t slot, int64_t n) { flush(slot, n); });
  }

  T* raw_grad(int64_t slot, int64_t tile) const { return raw_grad_ + (slot * this->tiles() + tile) * C_ * kTileWidth; }
  T* projected_grad(int64_t slot, int64_t tile) const {
    return projected_grad_ + (slot * this->tiles() + tile) * this->scale().rows_padded * kTileWidth;
  }

  // Adjoint of the blend: gradients of `count` rows of pixels, grad [count, kTilePixels], to those of native rows.
  void spread_raw(const Tile<T>& tile, const T* grad) const {
    for (int i = 0; i < num_spreads_; ++i) {
      spread(tile, spreads_[i], grad, C_, raw_grad(spreads_[i].slot, tile.index));
    }
  }
  void spread_projected(const Tile<T>& tile, const T* grad, int64_t row, int64_t count) const {
    for (int i = 0; i < num_spreads_; ++i) {
      spread(tile, spreads_[i], grad, count, projected_grad(spreads_[i].slot, tile.index) + row * kTileWidth);
    }
  }

  // Carry what has been added up in floats over to the doubles.
  void drain() {
    if (this->scale().used) outer_.drain(this->scale().rows, C_ + 1, total_);
    flushes_ = 0;
  }

 private:
  // A row that output rows of this group give something to is overwritten by the first of them, any other cleared.
  void start_slot(int64_t slot) {
    for (int i = 0; i < num_spreads_; ++i) {
      if (spreads_[i].slot != slot) continue;
      spreads_[i].fresh = true;
      return;
    }
    const int64_t tiles = this->tiles();
    std::memset(raw_grad(slot, 0), 0, sizeof(T) * tiles * C_ * kTileWidth);
    std::memset(projected_grad(slot, 0), 0, sizeof(T) * tiles * this->scale().rows_padded * kTileWidth);
  }

  void add_spread(int64_t slot, int64_t row, T weight) {
    int i = 0;
    while (i < num_spreads_ && spreads_[i].slot != slot) ++i;
    RowSpread<T>& to = spreads_[i];
    if (i == num_spreads_) {
      ++num_spreads_;
      to = {slot, false, static_cast<int>(row), 0, {}};
    }
    to.weight[row - to.first] = weight;
    to.count = static_cast<int>(row) - to.first + 1;
  }

  static void spread(const Tile<T>& tile, const RowSpread<T>& from, const T* grad, int64_t rows, T* to) {
    int done = 0;
    if (from.fresh) {
      done = from.count < 4 ? from.count : 4;
      spread_rows<true>(tile, from, 0, done, grad, rows, to);
    }
    while (done < from.count) {
      const int count = from.count - done < 4 ? from.count - done : 4;
      spread_rows<false>(tile, from, done, count, grad, rows, to);
      done += count;
    }
  }

  template <bool kFresh>
  static void spread_rows(const Tile<T>& tile, const RowSpread<T>& from, int skip, int count, const T* grad,
                          int64_t rows, T* to) {
    switch (count) {
      case 1: return spread_rows_of<kFresh, 1>(tile, from, skip, grad, rows, to);
      case 2: return spread_rows_of<kFresh, 2>(tile, from, skip, grad, rows, to);
      case 3: return spread_rows_of<kFresh, 3>(tile, from, skip, grad, rows, to);
      default: return spread_rows_of<kFresh, 4>(tile, from, skip, grad, rows, to);
    }
  }

  template <bool kFresh, int kCount>
  static void spread_rows_of(const Tile<T>& tile, const RowSpread<T>& from, int skip, const T* grad, int64_t rows,
                             T* to) {
    constexpr int64_t kV = kWidth<T>;
    const int64_t pitch = tile.columns * kV;
    Vec<T> weight[kCount];
    repeat<kCount>([&](int i) LOMIX_INLINE { weight[i] = Vec<T>(from.weight[skip + i]); });
    const T* first = grad + (from.first + skip) * pitch;
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t v = 0; v < pitch; v += kV) {
        T* at = to + k * kTileWidth + v;
        Vec<T> sum(0);
        if constexpr (!kFresh) sum = Vec<T>::loadu(at);
        repeat<kCount>([&](int i) LOMIX_INLINE {
          sum = at::vec::fmadd(weight[i], Vec<T>::loadu(first + k * kTilePixels + i * pitch + v), sum);
        });
        sum.store(at);
      }
      for (int64_t v = pitch; kFresh && v < kTileWidth; v += kV) Vec<T>(0).store(to + k * kTileWidth + v);
    }
  }

  // A native row is complete: through the projection, then along x and z.
  void flush(int64_t slot, int64_t n) {
    constexpr int64_t kV = kWidth<T>, kVectors = kTileWidth / kV;
    const Scale<T>& scale = this->scale();
    const int64_t tiles = this->tiles();
    if (scale.rows > 0) {
      for (int64_t c = 0; c < outer_.columns; ++c) {
        const bool real = c < C_;
        column_[c] = real ? this->raw(slot, 0) + c * kTileWidth : constant_ + (c == C_ ? kTileWidth : 0);
        step_[c] = real ? C_ * kTileWidth : 0;
      }
      outer_.add(projected_grad(slot, 0), kTileWidth, tiles, kVectors, column_, step_);
      if (++flushes_ == kMostAdditions) drain();
      for (int64_t t = 0; t < tiles; ++t) {
        multiply<true>(scale.projection, C_, 1, C_, scale.rows, projected_grad(slot, t), kTileWidth, kVectors,
                       raw_grad(slot, t), kTileWidth);
      }
    }
    if (scale.identity) {
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t left = this->count() - t * kTileWidth, count = left < kTileWidth ? left : kTileWidth;
        for (int64_t c = 0; c < C_; ++c) {
          store_grads(scale, problem_.logit_type, unit_->batch, c, this->z(), n, this->x() + t * kTileWidth, count,
                      raw_grad(slot, t) + c * kTileWidth, 1);
        }
      }
      return;
    }
    for (int64_t c = 0; c < C_; c += kV) narrow(raw_grad(slot, 0), c);
    const Axis<T>& along_z = scale.axis[0];
    const T frac = along_z.frac[this->z()];
    add_native(T(1) - frac, along_z.lo[this->z()], n);
    if (frac != T(0)) add_native(frac, along_z.hi[this->z()], n);
  }

  // Adjoint of the interpolation along x, for a vector of classes from c on: from [tiles, C, kTileWidth] to
  // narrow_ [columns, class_pitch]. A native column is written once, when no pixel to come can touch it.
  void narrow(const T* from, int64_t c) {
    using Index = typename Axis<T>::Index;
    constexpr int64_t kV = kWidth<T>;
    const Axis<T>& axis = this->scale().axis[2];
    alignas(64) Index offsets[kV];
    for (int64_t i = 0; i < kV; ++i) offsets[i] = static_cast<Index>((c + i < C_ ? c + i : c) * kTileWidth);
    const Vec<Index> offset = Vec<Index>::loadu(offsets);
    int64_t column = this->first_column();
    const auto put = [&](int64_t at, const Vec<T>& value) {
      value.store(narrow_ + (at - this->first_column()) * class_pitch_ + c);
    };
    Vec<T> lo_sum(0), hi_sum(0);  // of `column` and of the one after it
    for (int64_t i = 0; i < this->count(); ++i) {
      const int64_t x = this->x() + i;
      for (; column < axis.lo[x]; ++column) {
        put(column, lo_sum);
        lo_sum = hi_sum;
        hi_sum = Vec<T>(0);
      }
      const T* at = from + (i / kTileWidth) * C_ * kTileWidth + i % kTileWidth;
      const Vec<T> grad = at::vec::gather<sizeof(T)>(at, offset);
      const Vec<T> frac(axis.frac[x]);
      lo_sum = at::vec::fmadd(Vec<T>(1) - frac, grad, lo_sum);
      hi_sum = at::vec::fmadd(frac, grad, hi_sum);
    }
    const int64_t end = this->first_column() + this->num_columns();
    for (; column < end; ++column) {
      put(column, lo_sum);
      lo_sum = hi_sum;
      hi_sum = Vec<T>(0);
    }
  }

  // Add weight * narrow_ to the unit's private gradient, [nz, ny, columns that are read, C].
  void add_native(T weight, int64_t native_z, int64_t native_y) const {
    const Scale<T>& scale = this->scale();
    const int64_t row =
        (native_z - unit_->native_z[index_]) * unit_->native_ny[index_] + (native_y - unit_->native_y[index_]);
    T* to =
        problem_.native_grads + unit_->native_offset[index_] + (row * scale.axis[2].kept + this->first_column()) * C_;
    for (int64_t i = 0; i < this->num_columns(); ++i) {
      for (int64_t c = 0; c < C_; ++c) to[i * C_ + c] += weight * narrow_[i * class_pitch_ + c];
    }
  }

  const Problem<T>& problem_;
  int64_t index_;
  int64_t C_;
  T* raw_grad_ = nullptr;        // as ScaleRows::raw
  T* projected_grad_ = nullptr;  // as ScaleRows::projected
  T* narrow_ = nullptr;          // [native columns of the block, class_pitch]
  int64_t class_pitch_ = 0;
  OuterSums<T> outer_{};
  T* constant_ = nullptr;
  const T** column_ = nullptr;
  int64_t* step_ = nullptr;
  int64_t flushes_ = 0;  // since the last drain
  const Unit* unit_ = nullptr;
  double* total_ = nullptr;
  RowSpread<T> spreads_[2 * kTileRows];
  int num_spreads_ = 0;
  int64_t* entered_ = nullptr;  // [slots], rows new in this group
  int64_t num_entered_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
