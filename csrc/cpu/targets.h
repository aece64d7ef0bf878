// What the pixels of a tile are held against: class numbers or dense values, and weights, as the loops want them.
#pragma once

#include <type_traits>

#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Call f with a pointer of the type.
template <typename F>
inline void with_type(LabelType type, const void* data, const F& f) {
  switch (type) {
    case LabelType::kUInt8: return f(static_cast<const uint8_t*>(data));
    case LabelType::kInt8: return f(static_cast<const int8_t*>(data));
    case LabelType::kInt16: return f(static_cast<const int16_t*>(data));
    case LabelType::kInt32: return f(static_cast<const int32_t*>(data));
    case LabelType::kInt64: return f(static_cast<const int64_t*>(data));
    case LabelType::kFloat: return f(static_cast<const float*>(data));
    case LabelType::kDouble: return f(static_cast<const double*>(data));
    case LabelType::kHalf: return f(static_cast<const c10::Half*>(data));
    case LabelType::kBFloat16: return f(static_cast<const c10::BFloat16*>(data));
  }
}

// Whether a number of the target is this one, exactly. Subnormal numbers, which are 0 to arithmetic here, are not 0.
template <typename Number>
inline bool is_number(Number number, int64_t wanted) {
  if constexpr (std::is_integral_v<Number>) {
    return static_cast<int64_t>(number) == wanted;
  } else {
    using Bits =
        std::conditional_t<sizeof(Number) == 8, uint64_t, std::conditional_t<sizeof(Number) == 4, uint32_t, uint16_t>>;
    Bits bits;
    std::memcpy(&bits, &number, sizeof(bits));
    if (wanted == 0) return static_cast<Bits>(bits << 1) == 0;
    return static_cast<double>(number) == static_cast<double>(wanted);
  }
}

// Labels were checked before the forward pass; the comparison is for those somebody changes before the backward pass,
// and for those that are ignored.
template <typename T, typename Label>
void mark_labels(const Tile<T>& tile, const Label* labels, int64_t row, int64_t count) {
  T* one_hot = tile.one_hot + row * tile.columns * kWidth<T>;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t label = static_cast<int64_t>(labels[p]);
    if (static_cast<uint64_t>(label) < static_cast<uint64_t>(tile.num_classes)) {
      one_hot[label * kTilePixels + p] = T(1);
    }
  }
}

// Fill one_hot with y_c, and exists.
template <typename T>
void load_values(const Problem<T>& problem, const Tile<T>& tile, const Place& at) {
  const TargetData<T>& target = problem.target;
  const int64_t pitch = tile.columns * kWidth<T>;
  for (int c = 0; c < tile.num_classes; ++c) {
    std::memset(tile.one_hot + c * kTilePixels, 0, sizeof(T) * tile.pixels());
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t p = 0; p < pitch; ++p) tile.exists[r * pitch + p] = p < at.count ? T(1) : T(0);
    if (!target.dense) {
      const int64_t first = ((at.batch * problem.depth + at.z) * problem.height + at.y + r) * problem.width + at.x;
      with_type(target.type, target.values,
                [&](const auto* labels) { mark_labels(tile, labels + first, r, at.count); });
      continue;
    }
    const int64_t* s = target.stride;
    for (int c = 0; c < tile.num_classes; ++c) {
      const int64_t first = at.batch * s[0] + c * s[1] + at.z * s[2] + (at.y + r) * s[3] + at.x * s[4];
      T* to = tile.one_hot + c * kTilePixels + r * pitch;
      with_type(target.type, target.values, [&](const auto* from) { load_strided(from + first, s[4], at.count, to); });
    }
  }
}

// tile.weight: the weights as given, 1 without any, 0 where the label is ignored and past the width. What is ignored
// has y_c = 0 from here on; exists says whether a pixel counts at all.
template <typename T>
void load_weights(const Problem<T>& problem, const Tile<T>& tile, const Place& at) {
  const TargetData<T>& target = problem.target;
  const int64_t pitch = tile.columns * kWidth<T>;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* weight = tile.weight + r * pitch;
    for (int64_t p = 0; p < pitch; ++p) weight[p] = p < at.count ? T(1) : T(0);
    if (target.weight != nullptr) {
      const int64_t* s = target.weight_stride;
      const int64_t first = at.batch * s[0] + at.z * s[1] + (at.y + r) * s[2] + at.x * s[3];
      with_type(target.weight_type, target.weight,
                [&](const auto* from) { load_strided(from + first, s[3], at.count, weight); });
    }
    if (!target.has_ignore) continue;
    T* exists = tile.exists + r * pitch;
    if (target.dense) {  // one class
      T* values = tile.one_hot + r * pitch;
      const int64_t* s = target.stride;
      const int64_t first = at.batch * s[0] + at.z * s[2] + (at.y + r) * s[3] + at.x * s[4];
      with_type(target.type, target.values, [&](const auto* given) {
        for (int64_t p = 0; p < at.count; ++p) {
          if (is_number(given[first + p * s[4]], target.ignore)) values[p] = weight[p] = exists[p] = T(0);
        }
      });
      continue;
    }
    const int64_t first = ((at.batch * problem.depth + at.z) * problem.height + at.y + r) * problem.width + at.x;
    with_type(target.type, target.values, [&](const auto* labels) {
      for (int64_t p = 0; p < at.count; ++p) {
        const int64_t label = static_cast<int64_t>(labels[first + p]);
        if (label != target.ignore) continue;
        weight[p] = exists[p] = T(0);
        if (static_cast<uint64_t>(label) < static_cast<uint64_t>(tile.num_classes)) {
          tile.one_hot[label * kTilePixels + r * pitch + p] = T(0);
        }
      }
    });
  }
}

// Make shares and totals of y_c, which one_hot holds, and weigh it. counts [1 + C] vectors get the sums that recipes
// need of the target; null in the backward pass.
template <bool kSigmoid, typename T>
void weigh(const Problem<T>& problem, const Tile<T>& tile, T* counts) {
  constexpr int64_t kV = kWidth<T>;
  const TargetData<T>& target = problem.target;
  const bool by_class = !target.dense;
  for (int64_t p = 0, end = tile.pixels(); p < end; p += kV) {
    const Vec<T> weight = Vec<T>::loadu(tile.weight + p);
    const Vec<T> ce = target.weighted_ce ? weight : Vec<T>::loadu(tile.exists + p);
    Vec<T> sum(0), normal(0);
    for (int c = 0; c < tile.num_classes; ++c) {
      T* at = tile.one_hot + c * kTilePixels + p;
      const Vec<T> y = Vec<T>::loadu(at), hot = y * weight;
      const Vec<T> share = ce * at::vec::fmadd(Vec<T>(target.a[c]), y, Vec<T>(target.b[c]));
      hot.store(at);
      share.store(tile.share + c * kTilePixels + p);
      if constexpr (kSigmoid) {
        (ce * (Vec<T>(1) - y)).store(tile.total + c * kTilePixels + p);
      } else {
        sum = sum + share;
        normal = at::vec::fmadd(y, Vec<T>(target.ce_weight[c]), normal);
      }
      if (counts == nullptr) continue;
      T* count = counts + (1 + c) * kV;
      (Vec<T>::loadu(count) + (problem.squared ? hot * y : hot)).store(count);
    }
    if constexpr (!kSigmoid) sum.store(tile.total + p);
    if (counts == nullptr) continue;
    (Vec<T>::loadu(counts) + (by_class ? normal * ce : ce)).store(counts);
  }
}

// Everything of a tile's target; `counts` as for `weigh`.
template <Kind kKind, typename T>
void load_target(const Problem<T>& problem, Tile<T>& tile, const Place& at, T* counts) {
  constexpr int64_t kV = kWidth<T>;
  tile.whole = problem.target.weight == nullptr && !problem.target.has_ignore && at.count == tile.columns * kWidth<T>;
  load_values(problem, tile, at);
  if constexpr (kKind != Kind::kPlain) {
    load_weights(problem, tile, at);
    weigh<kKind == Kind::kSigmoid>(problem, tile, counts);
  } else if (counts != nullptr) {
    for (int c = 0; c < tile.num_classes; ++c) {
      Vec<T> count = Vec<T>::loadu(counts + (1 + c) * kV);
      for (int64_t p = 0, end = tile.pixels(); p < end; p += kV) {
        count = count + Vec<T>::loadu(tile.one_hot + c * kTilePixels + p);
      }
      count.store(counts + (1 + c) * kV);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
