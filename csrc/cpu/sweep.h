// Walks the output rows of a unit in tiles: several short rows at once, or parts of a long one.
#pragma once

#include "rows.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Labels were checked before the forward pass; the comparison is for those somebody changes before the backward pass.
template <typename T, typename Label>
void mark_labels(const Tile<T>& tile, const Label* labels, int64_t num_classes) {
  const T ones = Tile<T>::all_ones();
  for (int64_t p = 0; p < tile.count; ++p) {
    const int64_t label = static_cast<int64_t>(labels[p]);
    if (static_cast<uint64_t>(label) < static_cast<uint64_t>(num_classes)) {
      tile.label_mask[label * tile.capacity + p] = ones;
    }
  }
}

// Fill tile.label_mask for the `count` pixels that start at `pixel` of the whole label tensor.
template <typename T>
void load_labels(const Problem<T>& problem, const Tile<T>& tile, int64_t pixel) {
  std::memset(tile.label_mask, 0, sizeof(T) * problem.num_classes * tile.capacity);
  switch (problem.label_type) {
    case LabelType::kUInt8:
      return mark_labels(tile, static_cast<const uint8_t*>(problem.labels) + pixel, problem.num_classes);
    case LabelType::kInt8:
      return mark_labels(tile, static_cast<const int8_t*>(problem.labels) + pixel, problem.num_classes);
    case LabelType::kInt16:
      return mark_labels(tile, static_cast<const int16_t*>(problem.labels) + pixel, problem.num_classes);
    case LabelType::kInt32:
      return mark_labels(tile, static_cast<const int32_t*>(problem.labels) + pixel, problem.num_classes);
    case LabelType::kInt64:
      return mark_labels(tile, static_cast<const int64_t*>(problem.labels) + pixel, problem.num_classes);
  }
}

// A run of tile pixels within one output row.
struct Segment {
  int64_t y, x, count, offset;
};

// For every tile of the unit: load labels, let `per_segment(Segment)` fill the scales, call `per_tile()`, then
// `after_segment(Segment)`. `start(z)` and `finish()` frame each z. Labels are contiguous, so the rows of a tile are
// too.
template <typename T, typename Start, typename Fill, typename Work, typename After, typename Finish>
void sweep(const Problem<T>& problem, const Unit& unit, Tile<T>& tile, const Start& start, const Fill& per_segment,
           const Work& per_tile, const After& after_segment, const Finish& finish) {
  constexpr int64_t kV = Vec<T>::size();
  const int64_t W = problem.width;
  const int64_t rows_at_once = W <= tile.capacity ? tile.capacity / W : 1;
  const int64_t parts = (W + tile.capacity - 1) / tile.capacity;
  const int64_t part = ((W + parts - 1) / parts + kV - 1) / kV * kV;  // even parts, whole vectors
  for (int64_t z = unit.z_begin; z < unit.z_end; ++z) {
    start(z);
    for (int64_t y = unit.y_begin; y < unit.y_end; y += rows_at_once) {
      const int64_t rows = unit.y_end - y < rows_at_once ? unit.y_end - y : rows_at_once;
      for (int64_t x = 0; x < W; x += part) {
        const int64_t width = W - x < part ? W - x : part;
        tile.resize(rows * width, problem.num_scales * problem.num_classes);
        load_labels(problem, tile, ((unit.batch * problem.depth + z) * problem.height + y) * W + x);
        for (int64_t r = 0; r < rows; ++r) per_segment(Segment{y + r, x, width, r * width});
        per_tile();
        for (int64_t r = 0; r < rows; ++r) after_segment(Segment{y + r, x, width, r * width});
      }
    }
    finish();
  }
}

// One row reader or writer a scale, made in place: kernels use no containers, so that no code of the standard library
// is compiled for a capability the machine may lack.
template <typename Row>
class PerScale {
 public:
  template <typename T>
  PerScale(const Problem<T>& problem, Arena& arena) : count_(problem.num_scales) {
    for (int64_t l = 0; l < count_; ++l) new (at(l)) Row(problem, l, arena);
  }
  Row& operator[](int64_t l) { return *at(l); }
  int64_t size() const { return count_; }

 private:
  Row* at(int64_t l) { return reinterpret_cast<Row*>(storage_) + l; }
  alignas(Row) unsigned char storage_[sizeof(Row) * kMaxScales];
  int64_t count_;
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
