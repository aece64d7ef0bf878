// Softmax of one map over a tile: exponentials, then the gradient backward. The sums forward are in statistics.h.
//
// Classes are the outer loop and a block of vectors of pixels the inner one: as many independent pixels as registers
// hold the tops and sums of. The long way from a logit to its exponential then never waits for itself, and any number
// of classes costs the same per class.
#pragma once

#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Vectors in a block.
template <typename T>
inline constexpr int kBlock = sizeof(Vec<T>) == 64 ? 8 : 4;

// Call f.template operator()<N>(p) over all vectors [p, p + N * width) of the first `pixels` pixels.
template <typename T, typename F>
inline LOMIX_INLINE void for_blocks(int64_t pixels, const F& f) {
  constexpr int64_t kV = kWidth<T>;
  int64_t p = 0;
  for (; p + kBlock<T> * kV <= pixels; p += kBlock<T> * kV) f.template operator()<kBlock<T>>(p);
  if (kBlock<T> > 4 && p + 4 * kV <= pixels) {
    f.template operator()<4>(p);
    p += 4 * kV;
  }
  if (p + 2 * kV <= pixels) {
    f.template operator()<2>(p);
    p += 2 * kV;
  }
  if (p < pixels) f.template operator()<1>(p);
}

// Turn the logits in tile.map into exponentials relative to tile.top, and make tile.sum and tile.inverse of them.
// Logits and tops are in units of log2, that is times log2(e): then the largest one's exponential is exactly 1 without
// a multiplication for each.
template <typename T>
void exponentiate(const Tile<T>& tile) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t end = tile.num_classes * kTilePixels;
  T *map = tile.map, *top_at = tile.top, *sum_at = tile.sum, *inverse_at = tile.inverse;
  const T* exists = tile.exists;
  for_blocks<T>(tile.pixels(), [&]<int N>(int64_t p) LOMIX_INLINE {
    Vec<T> top[N], sum[N];
    repeat<N>([&](int n) LOMIX_INLINE {
      top[n] = Vec<T>::loadu(top_at + p + n * kV);
      sum[n] = Vec<T>(0);
    });
    for (int64_t at = p; at < end; at += kTilePixels) {
      repeat<N>([&](int n) LOMIX_INLINE {
        const Vec<T> e = exp2_softmax(Vec<T>::loadu(map + at + n * kV) - top[n]);
        e.store(map + at + n * kV);
        sum[n] = sum[n] + e;
      });
    }
    repeat<N>([&](int n) LOMIX_INLINE {
      sum[n].store(sum_at + p + n * kV);
      (Vec<T>::loadu(exists + p + n * kV) / sum[n]).store(inverse_at + p + n * kV);
    });
  });
}

// dLoss/dmap, to [C, kTilePixels], from the exponentials in tile.map and from dLoss/dstats of this map, grad [1 + 2C],
// whose gQ is doubled already if squared:
//   t_c = gI_c [y == c] + 2 gQ_c s_c (or gQ_c);  d_c = s_c (t_c - sum_k s_k t_k + g_ce) - g_ce [y == c]
template <bool kSquared, typename T>
void push_gradient(const Tile<T>& tile, const T* grad, T* to) {
  constexpr int64_t kV = kWidth<T>;
  const int C = tile.num_classes;
  const T *one_hot = tile.one_hot, *map = tile.map, *inverse_at = tile.inverse;
  const Vec<T> g_ce(grad[0]);
  const T *g_i = grad + 1, *g_q = grad + 1 + C;
  for_blocks<T>(tile.pixels(), [&]<int N>(int64_t p) LOMIX_INLINE {
    Vec<T> inverse[N], dot[N];
    repeat<N>([&](int n) LOMIX_INLINE {
      inverse[n] = Vec<T>::loadu(inverse_at + p + n * kV);
      dot[n] = Vec<T>(0);
    });
    int64_t at = p;
    for (int c = 0; c < C; ++c, at += kTilePixels) {
      const Vec<T> i(g_i[c]), q(g_q[c]);
      repeat<N>([&](int n) LOMIX_INLINE {
        const Vec<T> s = Vec<T>::loadu(map + at + n * kV) * inverse[n];
        s.store(to + at + n * kV);
        const Vec<T> slope = at::vec::fmadd(Vec<T>::loadu(one_hot + at + n * kV), i, kSquared ? q * s : q);
        dot[n] = at::vec::fmadd(s, slope, dot[n]);
      });
    }
    repeat<N>([&](int n) LOMIX_INLINE { dot[n] = g_ce - dot[n]; });
    at = p;
    for (int c = 0; c < C; ++c, at += kTilePixels) {
      const Vec<T> i(g_i[c]), q(g_q[c]);
      repeat<N>([&](int n) LOMIX_INLINE {
        const Vec<T> s = Vec<T>::loadu(to + at + n * kV), hot = Vec<T>::loadu(one_hot + at + n * kV);
        const Vec<T> slope = kSquared ? at::vec::fmadd(q, s, dot[n]) : q + dot[n];
        at::vec::fmsub(s, at::vec::fmadd(hot, i, slope), g_ce * hot).store(to + at + n * kV);
      });
    }
  });
}

template <typename T>
void push_gradient(const Tile<T>& tile, bool squared, const T* grad, T* to) {
  squared ? push_gradient<true>(tile, grad, to) : push_gradient<false>(tile, grad, to);
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
