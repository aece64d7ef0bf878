// Interpolation of native rows to full size and its adjoint, separable, one output row after the other.
#pragma once

#include "strided.h"
#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// to[i] = a * x[i] + b * y[i]
template <typename T>
void blend_rows(T a, const T* x, T b, const T* y, int64_t count, T* to) {
  constexpr int64_t kV = Vec<T>::size();
  const Vec<T> va(a), vb(b);
  int64_t i = 0;
  for (; i + kV <= count; i += kV) (va * Vec<T>::loadu(x + i) + vb * Vec<T>::loadu(y + i)).store(to + i);
  for (; i < count; ++i) to[i] = a * x[i] + b * y[i];
}

// to[i] += a * x[i]
template <typename T>
void add_scaled_row(T a, const T* x, int64_t count, T* to) {
  constexpr int64_t kV = Vec<T>::size();
  const Vec<T> va(a);
  int64_t i = 0;
  for (; i + kV <= count; i += kV) at::vec::fmadd(va, Vec<T>::loadu(x + i), Vec<T>::loadu(to + i)).store(to + i);
  for (; i < count; ++i) to[i] += a * x[i];
}

// Forward: the two native rows around the current output row, already interpolated along z and x. A native row is
// interpolated once for all the output rows it serves.
template <typename T>
class RowReader {
 public:
  RowReader(const Problem<T>& problem, int64_t scale, Arena& arena) : problem_(problem), scale_(problem.scales[scale]) {
    constexpr int64_t kV = Vec<T>::size();
    pitch_ = (problem.width + kV - 1) / kV * kV;
    if (!scale_.used || scale_.identity) return;
    rows_ = arena.take<T>(2 * problem.num_classes * pitch_);  // [2, C, pitch]
    native_ = arena.take<T>(scale_.size[2]);
    other_ = arena.take<T>(scale_.size[2]);
  }

  void start(int64_t batch, int64_t z) {
    batch_ = batch;
    z_ = z;
    held_[0] = held_[1] = -1;
  }

  // Write P[c][0 .. count) for output row y from x on, to[c * capacity + i].
  void read(int64_t y, int64_t x, int64_t count, T* to, int64_t capacity) {
    if (!scale_.used) return;
    const int64_t C = problem_.num_classes;
    if (scale_.identity) {
      for (int64_t c = 0; c < C; ++c) {
        load_logits(scale_, problem_.logit_type, batch_, c, z_, y, x, count, to + c * capacity);
      }
      return;
    }
    const T* lo = row(scale_.axis[1].lo[y]);
    const T* hi = row(scale_.axis[1].hi[y]);
    const T frac = scale_.axis[1].frac[y];
    for (int64_t c = 0; c < C; ++c) {
      blend_rows(T(1) - frac, lo + c * pitch_ + x, frac, hi + c * pitch_ + x, count, to + c * capacity);
    }
  }

 private:
  // lo and hi of one output row are equal or neighbours, so two slots by parity never evict one another.
  const T* row(int64_t native_y) {
    const int64_t slot = native_y & 1;
    T* to = rows_ + slot * problem_.num_classes * pitch_;
    if (held_[slot] == native_y) return to;
    held_[slot] = native_y;
    const Axis<T>& axis = scale_.axis[0];
    const int64_t w = scale_.size[2];
    for (int64_t c = 0; c < problem_.num_classes; ++c) {
      load_logits(scale_, problem_.logit_type, batch_, c, axis.lo[z_], native_y, 0, w, native_);
      if (axis.frac[z_] != T(0)) {
        load_logits(scale_, problem_.logit_type, batch_, c, axis.hi[z_], native_y, 0, w, other_);
        blend_rows(T(1) - axis.frac[z_], native_, axis.frac[z_], other_, w, native_);
      }
      along_x(native_, to + c * pitch_);
    }
    return to;
  }

  void along_x(const T* from, T* to) const {
    constexpr int64_t kV = Vec<T>::size();
    const Axis<T>& axis = scale_.axis[2];
    const int64_t width = problem_.width;
    if (scale_.size[2] == width) {
      std::memcpy(to, from, sizeof(T) * width);
      return;
    }
    using VecIndex = at::vec::Vectorized<typename Axis<T>::Index>;
    int64_t x = 0;
    for (; x + kV <= width; x += kV) {
      const Vec<T> frac = Vec<T>::loadu(axis.frac + x);
      const Vec<T> lo = at::vec::gather<sizeof(T)>(from, VecIndex::loadu(axis.lo + x));
      const Vec<T> hi = at::vec::gather<sizeof(T)>(from, VecIndex::loadu(axis.hi + x));
      ((Vec<T>(1) - frac) * lo + frac * hi).store(to + x);
    }
    for (; x < width; ++x) to[x] = (T(1) - axis.frac[x]) * from[axis.lo[x]] + axis.frac[x] * from[axis.hi[x]];
  }

  const Problem<T>& problem_;
  const Scale<T>& scale_;
  int64_t pitch_;
  T* rows_ = nullptr;
  T* native_ = nullptr;
  T* other_ = nullptr;
  int64_t batch_ = 0, z_ = 0;
  int64_t held_[2] = {-1, -1};
};

// Backward: collects gradients of output rows into the native rows around them, and carries a native row through the
// adjoint of x and z only once it is complete. Gathers into memory private to the unit; no atomics.
template <typename T>
class RowWriter {
 public:
  RowWriter(const Problem<T>& problem, int64_t scale, Arena& arena)
      : problem_(problem), scale_(problem.scales[scale]), index_(scale) {
    constexpr int64_t kV = Vec<T>::size();
    pitch_ = (problem.width + kV - 1) / kV * kV;
    if (!scale_.used || scale_.identity) return;
    rows_ = arena.take<T>(2 * problem.num_classes * pitch_);        // [2, C, pitch]
    native_ = arena.take<T>(scale_.size[2] * problem.num_classes);  // [w, C]
  }

  void start(const Unit& unit, int64_t z) {
    unit_ = &unit;
    z_ = z;
    held_[0] = held_[1] = -1;
  }

  // Add dP[c][0 .. count) of output row y from x on, from[c * capacity + i].
  void write(int64_t y, int64_t x, int64_t count, const T* from, int64_t capacity) {
    if (!scale_.used) return;
    const int64_t C = problem_.num_classes;
    if (scale_.identity) {
      for (int64_t c = 0; c < C; ++c) {
        store_grads(scale_, problem_.logit_type, unit_->batch, c, z_, y, x, count, from + c * capacity, 1);
      }
      return;
    }
    const Axis<T>& axis = scale_.axis[1];
    T* lo = row(axis.lo[y]);
    T* hi = row(axis.hi[y]);
    for (int64_t c = 0; c < C; ++c) {
      add_scaled_row(T(1) - axis.frac[y], from + c * capacity, count, lo + c * pitch_ + x);
      add_scaled_row(axis.frac[y], from + c * capacity, count, hi + c * pitch_ + x);
    }
  }

  // Hand over the rows still held; call at the end of every z.
  void finish() {
    if (!scale_.used || scale_.identity) return;
    flush(0);
    flush(1);
  }

 private:
  T* row(int64_t native_y) {
    const int64_t slot = native_y & 1;
    const int64_t length = problem_.num_classes * pitch_;
    if (held_[slot] != native_y) {
      flush(slot);
      held_[slot] = native_y;
      std::memset(rows_ + slot * length, 0, sizeof(T) * length);
    }
    return rows_ + slot * length;
  }

  void flush(int64_t slot) {
    if (held_[slot] < 0) return;
    const int64_t C = problem_.num_classes, w = scale_.size[2];
    const T* from = rows_ + slot * C * pitch_;
    const Axis<T>& along_x = scale_.axis[2];
    std::memset(native_, 0, sizeof(T) * w * C);
    for (int64_t x = 0; x < problem_.width; ++x) {  // classes innermost: neighbouring pixels share native columns
      T* lo = native_ + along_x.lo[x] * C;
      T* hi = native_ + along_x.hi[x] * C;
      const T frac = along_x.frac[x];
      for (int64_t c = 0; c < C; ++c) {
        const T g = from[c * pitch_ + x];
        lo[c] += (T(1) - frac) * g;
        hi[c] += frac * g;
      }
    }
    const Axis<T>& along_z = scale_.axis[0];
    const T frac = along_z.frac[z_];
    add_scaled_row(T(1) - frac, native_, w * C, destination(along_z.lo[z_], held_[slot]));
    if (frac != T(0)) add_scaled_row(frac, native_, w * C, destination(along_z.hi[z_], held_[slot]));
    held_[slot] = -1;
  }

  T* destination(int64_t native_z, int64_t native_y) const {
    const int64_t row =
        (native_z - unit_->native_z[index_]) * unit_->native_ny[index_] + (native_y - unit_->native_y[index_]);
    return problem_.native_grads + unit_->native_offset[index_] + row * scale_.size[2] * problem_.num_classes;
  }

  const Problem<T>& problem_;
  const Scale<T>& scale_;
  int64_t index_;
  int64_t pitch_;
  T* rows_ = nullptr;
  T* native_ = nullptr;
  const Unit* unit_ = nullptr;
  int64_t z_ = 0;
  int64_t held_[2] = {-1, -1};
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
