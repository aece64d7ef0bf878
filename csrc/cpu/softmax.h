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

// share * power, and 0 where there is no share, whatever the power: a class nobody asks for may have an infinite logit.
template <typename T>
inline Vec<T> shared(const Vec<T>& share, const Vec<T>& power) {
  return (share * power) & (share != Vec<T>(0));
}

// Turn the logits in tile.map into exponentials relative to tile.top, and make tile.sum and tile.inverse of them; with
// kShares tile.margin as well, minus the sum of share times logit relative to the top.
// Logits and tops are in units of log2, that is times log2(e): then the largest one's exponential is exactly 1 without
// a multiplication for each.
template <bool kShares, typename T>
void exponentiate(const Tile<T>& tile) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t end = tile.num_classes * kTilePixels;
  T *map = tile.map, *top_at = tile.top, *sum_at = tile.sum, *inverse_at = tile.inverse, *margin_at = tile.margin;
  const T *exists = tile.exists, *share = tile.share;
  for_blocks<T>(tile.pixels(), [&]<int N>(int64_t p) LOMIX_INLINE {
    Vec<T> top[N], sum[N], margin[kShares ? N : 1];
    repeat<N>([&](int n) LOMIX_INLINE {
      top[n] = Vec<T>::loadu(top_at + p + n * kV);
      sum[n] = Vec<T>(0);
      if constexpr (kShares) margin[n] = Vec<T>(0);
    });
    for (int64_t at = p; at < end; at += kTilePixels) {
      repeat<N>([&](int n) LOMIX_INLINE {
        const Vec<T> power = Vec<T>::loadu(map + at + n * kV) - top[n], e = exp2_softmax(power);
        e.store(map + at + n * kV);
        sum[n] = sum[n] + e;
        if constexpr (kShares) margin[n] = margin[n] - shared(Vec<T>::loadu(share + at + n * kV), power);
      });
    }
    repeat<N>([&](int n) LOMIX_INLINE {
      if constexpr (kShares) margin[n].store(margin_at + p + n * kV);
      sum[n].store(sum_at + p + n * kV);
      (Vec<T>::loadu(exists + p + n * kV) / sum[n]).store(inverse_at + p + n * kV);
    });
  });
}

// dLoss/dmap, to [C, kTilePixels], from the exponentials in tile.map and from dLoss/dstats of this map, grad [1 + 2C],
// whose gQ is doubled already if squared. Plain, with y one_hot:
//   u_c = gI_c y_c + 2 gQ_c s_c (or gQ_c);  d_c = s_c (u_c - sum_k s_k u_k + g_ce) - g_ce y_c
// otherwise, with w the weight, t_c the shares, T their total, and w y_c in one_hot:
//   u_c = gI_c w y_c + 2 gQ_c w s_c (or gQ_c w);  d_c = s_c (u_c - sum_k s_k u_k + g_ce T) - g_ce t_c
template <Kind kKind, bool kSquared, typename T>
void push_gradient(const Tile<T>& tile, const T* grad, T* to) {
  constexpr int64_t kV = kWidth<T>;
  constexpr bool kPlain = kKind == Kind::kPlain;
  const int C = tile.num_classes;
  const T *one_hot = tile.one_hot, *map = tile.map, *inverse_at = tile.inverse;
  const T *share_at = kPlain ? tile.one_hot : tile.share, *weight_at = tile.weight, *total_at = tile.total;
  const Vec<T> g_ce(grad[0]);
  const T *g_i = grad + 1, *g_q = grad + 1 + C;
  for_blocks<T>(tile.pixels(), [&]<int N>(int64_t p) LOMIX_INLINE {
    Vec<T> inverse[N], dot[N], weight[kPlain ? 1 : N];
    repeat<N>([&](int n) LOMIX_INLINE {
      inverse[n] = Vec<T>::loadu(inverse_at + p + n * kV);
      dot[n] = Vec<T>(0);
      if constexpr (!kPlain) weight[n] = Vec<T>::loadu(weight_at + p + n * kV);
    });
    const auto weighed = [&](const Vec<T>& q, int n) LOMIX_INLINE {
      if constexpr (kPlain) {
        return q;
      } else {
        return q * weight[n];
      }
    };
    int64_t at = p;
    for (int c = 0; c < C; ++c, at += kTilePixels) {
      const Vec<T> i(g_i[c]), q(g_q[c]);
      repeat<N>([&](int n) LOMIX_INLINE {
        const Vec<T> s = Vec<T>::loadu(map + at + n * kV) * inverse[n], all = weighed(q, n);
        s.store(to + at + n * kV);
        const Vec<T> slope = at::vec::fmadd(Vec<T>::loadu(one_hot + at + n * kV), i, kSquared ? all * s : all);
        dot[n] = at::vec::fmadd(s, slope, dot[n]);
      });
    }
    repeat<N>([&](int n) LOMIX_INLINE {
      if constexpr (kPlain) {
        dot[n] = g_ce - dot[n];
      } else {
        dot[n] = at::vec::fmsub(g_ce, Vec<T>::loadu(total_at + p + n * kV), dot[n]);
      }
    });
    at = p;
    for (int c = 0; c < C; ++c, at += kTilePixels) {
      const Vec<T> i(g_i[c]), q(g_q[c]);
      repeat<N>([&](int n) LOMIX_INLINE {
        const Vec<T> s = Vec<T>::loadu(to + at + n * kV), hot = Vec<T>::loadu(one_hot + at + n * kV);
        const Vec<T> share = kPlain ? hot : Vec<T>::loadu(share_at + at + n * kV), all = weighed(q, n);
        const Vec<T> slope = kSquared ? at::vec::fmadd(all, s, dot[n]) : all + dot[n];
        at::vec::fmsub(s, at::vec::fmadd(hot, i, slope), g_ce * share).store(to + at + n * kV);
      });
    }
  });
}

template <Kind kKind, typename T>
void push_gradient(const Tile<T>& tile, bool squared, const T* grad, T* to) {
  squared ? push_gradient<kKind, true>(tile, grad, to) : push_gradient<kKind, false>(tile, grad, to);
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
