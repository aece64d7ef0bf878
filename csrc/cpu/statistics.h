// The sums of one map that the forward pass is after.
#pragma once

#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Classes whose two sums are kept in one vector: I of each, then Q of each, then the same for the next lanes.
template <typename T>
inline constexpr int kGroup = kWidth<T> >= 4 ? 2 : 1;

// Sums of one map over the pixels of this thread, float lanes that are added up in doubles when they are drained.
template <typename T>
struct MapSums {
  static int64_t groups(int64_t C) { return (C + kGroup<T> - 1) / kGroup<T>; }
  static int64_t size(int64_t C) { return (3 + groups(C)) * kWidth<T>; }
  T* at;  // vectors: margins, log2 of sums, a product of mantissas, then groups(C) of I and Q

  void clear(int64_t C) const {
    std::memset(at, 0, sizeof(T) * size(C));
    Vec<T>(1).store(at + 2 * kWidth<T>);
  }
  void drain(int64_t C, double* stats) const {
    constexpr int64_t kV = kWidth<T>, kPart = 2 * kGroup<T>;
    const Vec<T> margin = Vec<T>::loadu(at), logs = Vec<T>::loadu(at + kV), product = Vec<T>::loadu(at + 2 * kV);
    constexpr double kLn2 = 0.69314718055994530942;
    stats[0] += kLn2 * (horizontal_sum(margin) + horizontal_sum(logs) + horizontal_sum(product.log2()));
    for (int64_t k = 0; k < groups(C) * kV; ++k) {
      const int64_t c = k / kV * kGroup<T> + k % kGroup<T>;
      const bool is_q = k % kPart >= kGroup<T>;
      if (c < C) stats[1 + (is_q ? C : 0) + c] += static_cast<double>(at[3 * kV + k]);
    }
    clear(C);
  }
};

// Add sums of kGroups groups of classes to where they are kept.
template <int kGroups, typename T>
inline LOMIX_INLINE void add_groups(const Vec<T>* i, const Vec<T>* q, T* to) {
  constexpr int64_t kV = kWidth<T>;
  repeat<kGroups>([&](int g) LOMIX_INLINE {
    const int k = g * kGroup<T>;
    Vec<T> sums;
    if constexpr (kGroup<T> == 1) {
      sums = interleave_sums(i[k], q[k]);
    } else {
      sums = interleave_sums(i[k], i[k + 1], q[k], q[k + 1]);
    }
    (Vec<T>::loadu(to + g * kV) + sums).store(to + g * kV);
  });
}

// Add I_c and Q_c of kCount classes from c on, c a multiple of kGroup, of the exponentials in tile.map.
template <Kind kKind, int kCount, bool kSquared, typename T>
void add_dice_of(const Tile<T>& tile, int c, T* groups) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t pixels = tile.pixels();
  const T *map = tile.map + c * kTilePixels, *one_hot = tile.one_hot + c * kTilePixels;
  const T *inverse_at = tile.inverse, *weight_at = tile.weight;
  constexpr int kGroups = (kCount + kGroup<T> - 1) / kGroup<T>;
  Vec<T> i[kGroups * kGroup<T>], q[kGroups * kGroup<T>];
  repeat<kGroups * kGroup<T>>([&](int k) LOMIX_INLINE {
    i[k] = Vec<T>(0);
    q[k] = Vec<T>(0);
  });
  for (int64_t p = 0; p < pixels; p += kV) {
    const Vec<T> inverse = Vec<T>::loadu(inverse_at + p);
    Vec<T> weight;
    if constexpr (kKind != Kind::kPlain) weight = Vec<T>::loadu(weight_at + p);
    repeat<kCount>([&](int k) LOMIX_INLINE {
      const Vec<T> s = Vec<T>::loadu(map + k * kTilePixels + p) * inverse;
      i[k] = at::vec::fmadd(s, Vec<T>::loadu(one_hot + k * kTilePixels + p), i[k]);
      if constexpr (kKind == Kind::kPlain) {
        q[k] = kSquared ? at::vec::fmadd(s, s, q[k]) : q[k] + s;
      } else {
        q[k] = at::vec::fmadd(kSquared ? s * s : s, weight, q[k]);
      }
    });
  }
  add_groups<kGroups>(i, q, groups + c / kGroup<T> * kV);
}

// Call f.template operator()<count>() with a count from 1 to kMost as a constant.
template <int kMost, typename F>
inline void with_count(int count, const F& f) {
  if (count == kMost) return f.template operator()<kMost>();
  if constexpr (kMost > 1) with_count<kMost - 1>(count, f);
}

template <Kind kKind, bool kSquared, typename T>
void add_dice(const Tile<T>& tile, T* groups) {
  constexpr int kMost = sizeof(Vec<T>) == 64 ? 12 : 6;  // as many as registers hold the sums of
  const int C = tile.num_classes;
  for (int c = 0; c < C;) {
    // What is left in two parts of about the same size rather than a large and a tiny one.
    const int left = C - c;
    const int count = left <= kMost ? left : left < 2 * kMost ? left / 2 & -kGroup<T> : kMost;
    with_count<kMost>(count, [&]<int kCount>() { add_dice_of<kKind, kCount, kSquared>(tile, c, groups); });
    c += count;
  }
}

// As many sums as may be multiplied before their exponents are split off, each from 1 to C: with more classes than this
// eight of them could overflow.
constexpr int kMostProductClasses = 1 << 15;

// Add the cross-entropy of the map whose exponentials are in the tile. `small_sums`: they may be less than 1.
// kUnits: what the logarithms are multiplied with is 0 or 1, so that they can be taken of products.
template <bool kPlain, bool kUnits, typename T>
void add_loss(const Tile<T>& tile, bool small_sums, const MapSums<T>& out) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t pixels = tile.pixels();
  const bool split_each = small_sums || tile.num_classes > kMostProductClasses;
  const T *margin_at = tile.margin, *sum_at = tile.sum, *total_at = kPlain ? tile.exists : tile.total;
  Vec<T> margin = Vec<T>::loadu(out.at), logs = Vec<T>::loadu(out.at + kV), product = Vec<T>::loadu(out.at + 2 * kV);
  for (int64_t p = 0; p < pixels; p += kV) {
    const Vec<T> total = Vec<T>::loadu(total_at + p), own = Vec<T>::loadu(margin_at + p);
    margin = kPlain ? at::vec::fmadd(total, own, margin) : margin + own;  // shares have weighed it already
    if constexpr (kUnits) {
      product = product * at::vec::fmadd(total, Vec<T>::loadu(sum_at + p), Vec<T>(1) - total);
      if (split_each || p % (8 * kV) == 7 * kV) split_exponent(product, logs);
    } else {
      logs = at::vec::fmadd(total, Vec<T>::loadu(sum_at + p).log2(), logs);
    }
  }
  if constexpr (kUnits) split_exponent(product, logs);
  margin.store(out.at);
  logs.store(out.at + kV);
  product.store(out.at + 2 * kV);
}

// Add the statistics of the map whose exponentials are in the tile.
template <Kind kKind, typename T>
void add_statistics(const Problem<T>& problem, const Tile<T>& tile, bool small_sums, const MapSums<T>& out) {
  if constexpr (kKind == Kind::kPlain) {
    add_loss<true, true>(tile, small_sums, out);
  } else {
    problem.target.unit_weights ? add_loss<false, true>(tile, small_sums, out)
                                : add_loss<false, false>(tile, small_sums, out);
  }
  T* const groups = out.at + 3 * kWidth<T>;
  problem.squared ? add_dice<kKind, true>(tile, groups) : add_dice<kKind, false>(tile, groups);
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
