// Softmax of one map over a tile: its sums forward, its gradient backward.
#pragma once

#include <cmath>

#include "exponential.h"
#include "mix.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// How many pixel sums, each in [1, C], may be multiplied before a logarithm is taken of the product.
template <typename T>
int64_t log_period(int num_classes) {
  const double exponents = sizeof(T) == 4 ? 126 : 1022;
  return num_classes < 2 ? 256 : static_cast<int64_t>(exponents / std::log2(static_cast<double>(num_classes)));
}

// Call f.template operator()<U>(pixel) over all vectors of the tile, two at a time: the chains of one vector (largest
// logit, exponential, sum) are long, and a second one beside it keeps the arithmetic units busy.
template <typename T, typename F>
void for_vectors(const Tile<T>& tile, const F& f) {
  constexpr int64_t kV = Vec<T>::size();
  int64_t v = 0;
  for (; v + 2 <= tile.vectors; v += 2) f.template operator()<2>(v * kV);
  if (v < tile.vectors) f.template operator()<1>(v * kV);
}

// tile.map[c] = exp(map[c] - max), tile.inverse = 1 / sum of them (0 in the padding). `map` may be tile.map itself.
// Returns the sum over pixels of -log softmax[y] if asked for.
template <typename T, bool kWithCe>
double exponentiate(const Tile<T>& tile, const T* map, int C, int64_t period) {
  constexpr int64_t kV = Vec<T>::size();
  const int64_t ld = tile.capacity;
  Vec<T> margin(0), logs(0), product(1);
  int64_t until_log = period;
  for_vectors(tile, [&]<int U>(int64_t p) {
    // 1. the largest logit, and the one of the label
    Vec<T> top[U], own[U], sum[U];
    for (int u = 0; u < U; ++u) {
      top[u] = Vec<T>::loadu(map + p + u * kV);
      own[u] = top[u] & Vec<T>::loadu(tile.label_mask + p + u * kV);
      sum[u] = Vec<T>(0);
    }
    for (int c = 1; c < C; ++c) {
      for (int u = 0; u < U; ++u) {
        const Vec<T> x = Vec<T>::loadu(map + c * ld + p + u * kV);
        top[u] = at::vec::clamp_min(x, top[u]);  // may lose a NaN, which then comes back as exp(NaN)
        if constexpr (kWithCe) own[u] = own[u] + (x & Vec<T>::loadu(tile.label_mask + c * ld + p + u * kV));
      }
    }
    // 2. exponentials and their sum
    for (int c = 0; c < C; ++c) {
      for (int u = 0; u < U; ++u) {
        const Vec<T> e = exp_nonpositive<T>(Vec<T>::loadu(map + c * ld + p + u * kV) - top[u]);
        e.store(tile.map + c * ld + p + u * kV);
        sum[u] = sum[u] + e;
      }
    }
    // 3. its inverse, and the parts of the cross-entropy
    for (int u = 0; u < U; ++u) {
      const Vec<T> lanes = Vec<T>::loadu(tile.lane_mask + p + u * kV);
      ((Vec<T>(1) / sum[u]) & lanes).store(tile.inverse + p + u * kV);
      if constexpr (kWithCe) {
        margin = margin + ((top[u] - own[u]) & lanes);
        product = product * Vec<T>::blendv(Vec<T>(1), sum[u], lanes);
        if (--until_log == 0) {
          logs = logs + product.log();
          product = Vec<T>(1);
          until_log = period;
        }
      }
    }
  });
  if constexpr (!kWithCe) return 0;
  return horizontal_sum(margin) + horizontal_sum(logs + product.log());
}

// stats[1 + c] += I_c, stats[1 + C + c] += Q_c from the exponentials of `exponentiate`.
template <typename T>
void accumulate_dice(const Tile<T>& tile, int C, bool squared, double* stats) {
  constexpr int64_t kV = Vec<T>::size();
  const Vec<T> slope(squared ? T(1) : T(0)), offset(squared ? T(0) : T(1));  // Q adds s * (slope * s + offset)
  const auto block = [&]<int R>(int c) {
    Vec<T> intersection[R], denominator[R];
    for (int r = 0; r < R; ++r) intersection[r] = denominator[r] = Vec<T>(0);
    for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
      const Vec<T> inverse = Vec<T>::loadu(tile.inverse + v);
      for (int r = 0; r < R; ++r) {
        const Vec<T> s = Vec<T>::loadu(tile.map + (c + r) * tile.capacity + v) * inverse;
        intersection[r] = intersection[r] + (s & Vec<T>::loadu(tile.label_mask + (c + r) * tile.capacity + v));
        denominator[r] = at::vec::fmadd(s, at::vec::fmadd(s, slope, offset), denominator[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      stats[1 + c + r] += horizontal_sum(intersection[r]);
      stats[1 + C + c + r] += horizontal_sum(denominator[r]);
    }
  };
  int c = 0;
  for (; c + 3 <= C; c += 3) block.template operator()<3>(c);
  for (; c < C; ++c) block.template operator()<1>(c);
}

// Turn the exponentials in tile.map into dLoss/dmap. grad is dLoss/dstats of this map, [1 + 2C].
//   t_c = gI_c [y == c] + 2 gQ_c s_c (or gQ_c);  d_c = s_c (t_c - sum_k s_k t_k + g_ce) - g_ce [y == c]
template <typename T>
void softmax_gradient(const Tile<T>& tile, int C, bool squared, const T* grad) {
  constexpr int64_t kV = Vec<T>::size();
  const int64_t ld = tile.capacity;
  const Vec<T> g_ce(grad[0]);
  const T slope = squared ? T(2) : T(0), offset = squared ? T(0) : T(1);
  const T* g_i = grad + 1;
  const T* g_q = grad + 1 + C;
  const auto t_of = [&](const Vec<T>& s, int c, int64_t v) {
    const Vec<T> mask = Vec<T>::loadu(tile.label_mask + c * ld + v);
    return (Vec<T>(g_i[c]) & mask) + at::vec::fmadd(s, Vec<T>(slope * g_q[c]), Vec<T>(offset * g_q[c]));
  };
  for_vectors(tile, [&]<int U>(int64_t p) {
    Vec<T> inverse[U], dot[U];
    for (int u = 0; u < U; ++u) {
      inverse[u] = Vec<T>::loadu(tile.inverse + p + u * kV);
      dot[u] = Vec<T>(0);
    }
    for (int c = 0; c < C; ++c) {
      for (int u = 0; u < U; ++u) {
        T* at = tile.map + c * ld + p + u * kV;
        const Vec<T> s = Vec<T>::loadu(at) * inverse[u];
        s.store(at);
        dot[u] = at::vec::fmadd(s, t_of(s, c, p + u * kV), dot[u]);
      }
    }
    for (int u = 0; u < U; ++u) dot[u] = g_ce - dot[u];
    for (int c = 0; c < C; ++c) {
      for (int u = 0; u < U; ++u) {
        T* at = tile.map + c * ld + p + u * kV;
        const Vec<T> s = Vec<T>::loadu(at);
        const Vec<T> mask = Vec<T>::loadu(tile.label_mask + c * ld + p + u * kV);
        (s * (t_of(s, c, p + u * kV) + dot[u]) - (g_ce & mask)).store(at);
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
