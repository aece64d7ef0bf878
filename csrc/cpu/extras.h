// The simpler mixes of any number of members: scales by themselves, their sum, difference, mean and maximum, as logits
// and backward. Only problems that are not plain use them.
#pragma once

#include "mix.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Sign and share of member number j.
inline double factor_of(Operator op, int j, int size) {
  if (op == Operator::kSub && j > 0) return -1;
  return op == Operator::kAvg ? 1.0 / size : 1;
}

// tile.map = sum of factor * P over the members, or their maximum, in units of log2.
template <Pass kPass, typename T>
void make_simple(const Tile<T>& tile, Operator op, const int* members, int size) {
  T factor[kMaxScales];
  const T* value[kMaxScales];
  for (int j = 0; j < size; ++j) {
    factor[j] = static_cast<T>(factor_of(op, j, size)) * kLog2E<T>;
    value[j] = tile.scale(members[j]);
  }
  const auto nothing = [](int64_t) LOMIX_INLINE { return Vec<T>(0); };
  if (op == Operator::kMax) {
    make_logits<kPass>(
        tile,
        [&](int64_t, int64_t at) LOMIX_INLINE {
          Vec<T> x = Vec<T>::loadu(value[0] + at);
          for (int j = 1; j < size; ++j) x = at::vec::maximum(x, Vec<T>::loadu(value[j] + at));  // keeps NaN
          return x * Vec<T>(kLog2E<T>);
        },
        nothing);
    return;
  }
  if (op == Operator::kAdd && size > 1) {
    with_size(size, [&]<int kSize>() {
      make_logits<kPass>(
          tile,
          [&](int64_t, int64_t at) LOMIX_INLINE {
            Vec<T> x = Vec<T>::loadu(value[0] + at);
            repeat<kSize - 1>([&](int j) LOMIX_INLINE { x = x + Vec<T>::loadu(value[j + 1] + at); });
            return x * Vec<T>(kLog2E<T>);
          },
          nothing);
    });
    return;
  }
  make_logits<kPass>(
      tile,
      [&](int64_t, int64_t at) LOMIX_INLINE {
        Vec<T> x = Vec<T>(factor[0]) * Vec<T>::loadu(value[0] + at);
        for (int j = 1; j < size; ++j) x = at::vec::fmadd(Vec<T>(factor[j]), Vec<T>::loadu(value[j] + at), x);
        return x;
      },
      nothing);
}

// Give the gradient d [C, kTilePixels] of such a map to its members: dP [L, C, kTilePixels].
template <typename T>
void unmix_simple(const Tile<T>& tile, Operator op, const int* members, int size, const T* d, T* scales) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t C = tile.num_classes, pixels = tile.pixels();
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t p = c * kTilePixels, end = p + pixels; p < end; p += kV) {
      Vec<T> left = Vec<T>::loadu(d + p), top(0);
      if (op == Operator::kMax) {
        top = Vec<T>::loadu(tile.scale(members[0]) + p);
        for (int j = 1; j < size; ++j) top = at::vec::maximum(top, Vec<T>::loadu(tile.scale(members[j]) + p));
      }
      for (int j = 0; j < size; ++j) {
        T* to = scales + members[j] * C * kTilePixels + p;
        Vec<T> share = left;
        if (op != Operator::kMax) {
          share = left * Vec<T>(static_cast<T>(factor_of(op, j, size)));
        } else if (j + 1 < size) {
          // The first of those that are the largest takes all; what is no number is larger than any.
          const Vec<T> x = Vec<T>::loadu(tile.scale(members[j]) + p), is_top = (x == top) | (x != x);
          share = Vec<T>::blendv(Vec<T>(0), left, is_top);
          left = Vec<T>::blendv(left, Vec<T>(0), is_top);
        }
        (Vec<T>::loadu(to) + share).store(to);
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
