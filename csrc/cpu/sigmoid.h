// Sigmoids of one map over a tile: binary cross-entropy forward, the gradient backward.
#pragma once

#include <type_traits>

#include "softmax.h"
#include "statistics.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// 1 / x for 1 <= x <= 2.
template <typename T>
inline Vec<T> reciprocal(const Vec<T>& x) {
  return Vec<T>(1) / x;
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> reciprocal<float>(const Vec<float>& x) {
  const __m512 guess = _mm512_rcp14_ps(x);  // error 2^-14; one step of Newton's squares it
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f)));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> reciprocal<float>(const Vec<float>& x) {
  const __m256 two = _mm256_set1_ps(2.0f);
  __m256 guess = _mm256_rcp_ps(x);  // error 1.5 * 2^-12
  guess = _mm256_mul_ps(guess, _mm256_fnmadd_ps(x, guess, two));
  return _mm256_mul_ps(guess, _mm256_fnmadd_ps(x, guess, two));
}
#endif

// log2(1 + u) for 0 <= u <= 1, with a small relative error also where u is tiny: u times the polynomial of degree 7
// whose relative error is least, 2e-7.
template <typename T>
inline Vec<T> log2_of_one_plus(const Vec<T>& u) {
  return u.log1p() * Vec<T>(kLog2E<T>);
}

template <>
inline Vec<float> log2_of_one_plus<float>(const Vec<float>& u) {
  Vec<float> p = at::vec::fmadd(Vec<float>(-0.0123193562f), u, Vec<float>(0.0636074543f));
  p = at::vec::fmadd(p, u, Vec<float>(-0.155351222f));
  p = at::vec::fmadd(p, u, Vec<float>(0.256009221f));
  p = at::vec::fmadd(p, u, Vec<float>(-0.353394628f));
  p = at::vec::fmadd(p, u, Vec<float>(0.480063647f));
  p = at::vec::fmadd(p, u, Vec<float>(-0.721310079f));
  p = at::vec::fmadd(p, u, Vec<float>(1.44269478f));
  return p * u;
}

// a, times b where x has a sign bit.
template <typename T>
inline Vec<T> times_if_negative(const Vec<T>& x, const Vec<T>& a, const Vec<T>& b) {
  return Vec<T>::blendv(a, a * b, x < Vec<T>(0));
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> times_if_negative<float>(const Vec<float>& x, const Vec<float>& a, const Vec<float>& b) {
  return _mm512_mask_mul_ps(a, _mm512_movepi32_mask(_mm512_castps_si512(x)), a, b);
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> times_if_negative<float>(const Vec<float>& x, const Vec<float>& a, const Vec<float>& b) {
  return _mm256_blendv_ps(a, _mm256_mul_ps(a, b), x);
}
#endif

// Chosen by the sign bit of x.
template <typename T>
inline Vec<T> if_negative(const Vec<T>& x, const Vec<T>& negative, const Vec<T>& other) {
  return Vec<T>::blendv(other, negative, x < Vec<T>(0));
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> if_negative<float>(const Vec<float>& x, const Vec<float>& negative, const Vec<float>& other) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), other, negative);
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> if_negative<float>(const Vec<float>& x, const Vec<float>& negative, const Vec<float>& other) {
  return _mm256_blendv_ps(other, negative, x);
}
#endif

// What a logit in units of log2 comes to: u = 2^-|x|, and the probability s.
template <typename T>
struct Sigmoid {
  Vec<T> below, u, s;  // -|x|
  LOMIX_INLINE explicit Sigmoid(const Vec<T>& x) : below(x.abs().neg()), u(exp2_softmax(below)) {
    s = times_if_negative(x, reciprocal(Vec<T>(1) + u), u);
  }
};

// Add the statistics of kCount classes from c on, c a multiple of kGroup, of the map whose logits are in tile.map.
// With w the weight, y_c the target, t_c the shares and r_c = w (1 - y_c) in tile.total, a pixel loses the sum over
// classes of (r_c + t_c) log(1 + e^-|x|) + |x| (t_c where x < 0, r_c elsewhere). kUniform: r_c + t_c is w for every
// class, and log is taken of products over classes, which tile.sum holds; like sums of exponentials those do not see
// what is below 2^-24. kWhole: every pixel has weight 1 for Dice.
template <bool kUniform, bool kSquared, bool kWhole, int kCount, typename T>
void add_sigmoid_of(const Tile<T>& tile, int c, Vec<T>& linear, Vec<T>& logs, T* groups) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t first = c * kTilePixels;
  const T *map = tile.map + first, *share_at = tile.share + first, *rest_at = tile.total + first;
  const T *hot_at = tile.one_hot + first, *weight_at = tile.weight;
  T* product_at = tile.sum;
  Vec<T> i[kGroup<T>], q[kGroup<T>], lost[kGroup<T>], log_sum[kGroup<T>];
  repeat<kGroup<T>>([&](int k) LOMIX_INLINE { i[k] = q[k] = lost[k] = log_sum[k] = Vec<T>(0); });
  const auto step = [&]<int N>(int64_t p) LOMIX_INLINE {
    repeat<N>([&](int n) LOMIX_INLINE {
      const int64_t at = p + n * kV;
      Vec<T> product(1);
      if constexpr (kUniform) product = Vec<T>::loadu(product_at + at);
      repeat<kCount>([&](int k) LOMIX_INLINE {
        const int64_t own = k * kTilePixels + at;
        const Vec<T> x = Vec<T>::loadu(map + own), rest = Vec<T>::loadu(rest_at + own);
        const Vec<T> share = Vec<T>::loadu(share_at + own);
        const Sigmoid<T> of(x);
        if constexpr (kUniform) {
          product = at::vec::fmadd(product, of.u, product);
        } else {
          log_sum[k] = at::vec::fmadd(rest + share, log2_of_one_plus(of.u), log_sum[k]);
        }
        // |x| times what is on its wrong side: no two large terms meet. Sums of their own for each class, or all would
        // wait for one.
        lost[k] = at::vec::fnmadd(of.below, if_negative(x, share, rest), lost[k]);
        i[k] = at::vec::fmadd(of.s, Vec<T>::loadu(hot_at + own), i[k]);
        if constexpr (kWhole) {
          q[k] = kSquared ? at::vec::fmadd(of.s, of.s, q[k]) : q[k] + of.s;
        } else {
          q[k] = at::vec::fmadd(kSquared ? of.s * of.s : of.s, Vec<T>::loadu(weight_at + at), q[k]);
        }
      });
      if constexpr (kUniform) product.store(product_at + at);
    });
  };
  int64_t p = 0;
  const int64_t pixels = tile.pixels();
  for (; p + 2 * kV <= pixels; p += 2 * kV) step.template operator()<2>(p);
  if (p < pixels) step.template operator()<1>(p);
  repeat<kGroup<T>>([&](int k) LOMIX_INLINE {
    linear = linear + lost[k];
    logs = logs + log_sum[k];
  });
  add_groups<1>(i, q, groups + c / kGroup<T> * kV);
}

template <bool kUniform, bool kSquared, bool kWhole, typename T>
void add_sigmoid_statistics(const Tile<T>& tile, const MapSums<T>& out) {
  constexpr int64_t kV = kWidth<T>;
  constexpr int kMostProducts = 64;  // of factors up to 2
  const int C = tile.num_classes;
  const int64_t pixels = tile.pixels();
  T* const groups = out.at + 3 * kV;
  Vec<T> linear = Vec<T>::loadu(out.at), logs = Vec<T>::loadu(out.at + kV);
  const auto drain = [&] {
    for (int64_t p = 0; p < pixels; p += kV) {
      const Vec<T> weight = Vec<T>::loadu(tile.total + p) + Vec<T>::loadu(tile.share + p);  // of any class
      logs = at::vec::fmadd(weight, Vec<T>::loadu(tile.sum + p).log2(), logs);
    }
  };
  for (int c = 0; c < C; c += kGroup<T>) {
    if (kUniform && c % kMostProducts == 0) {
      if (c > 0) drain();
      for (int64_t p = 0; p < pixels; p += kV) Vec<T>(1).store(tile.sum + p);
    }
    if (kGroup<T> == 2 && c + 1 < C) {
      add_sigmoid_of<kUniform, kSquared, kWhole, kGroup<T>>(tile, c, linear, logs, groups);
    } else {
      add_sigmoid_of<kUniform, kSquared, kWhole, 1>(tile, c, linear, logs, groups);
    }
  }
  if (kUniform) drain();
  linear.store(out.at);
  logs.store(out.at + kV);
}

// Add the statistics of the map whose logits are in the tile.
template <typename T>
void add_sigmoid_statistics(const Problem<T>& problem, const Tile<T>& tile, const MapSums<T>& out) {
  const auto with = [](bool flag, const auto& f) {
    flag ? f(std::bool_constant<true>()) : f(std::bool_constant<false>());
  };
  with(problem.target.uniform, [&](auto uniform) {
    with(problem.squared, [&](auto squared) {
      with(tile.whole, [&](auto whole) {
        add_sigmoid_statistics<decltype(uniform)::value, decltype(squared)::value, decltype(whole)::value>(tile, out);
      });
    });
  });
}

// dLoss/dmap, to [C, kTilePixels], from the logits in tile.map and dLoss/dstats of this map, see push_gradient:
//   d_c = g_ce ((r_c + t_c) s_c - t_c) + s_c (1 - s_c) (gI_c w y_c + 2 gQ_c w s_c (or gQ_c w))
template <bool kSquared, bool kWhole, typename T>
void push_sigmoid_gradient(const Tile<T>& tile, const T* grad, T* to) {
  constexpr int64_t kV = kWidth<T>;
  const int C = tile.num_classes;
  const T *map = tile.map, *share_at = tile.share, *rest_at = tile.total, *hot_at = tile.one_hot;
  const T* weight_at = tile.weight;
  const Vec<T> g_ce(grad[0]);
  for (int c = 0; c < C; ++c) {
    const Vec<T> g_i(grad[1 + c]), g_q(grad[1 + C + c]);
    for_blocks<T>(tile.pixels(), [&]<int N>(int64_t first) LOMIX_INLINE {
      const int64_t at = c * kTilePixels + first;
      repeat<N>([&](int n) LOMIX_INLINE {
        const int64_t p = at + n * kV;
        const Vec<T> s = Sigmoid<T>(Vec<T>::loadu(map + p)).s;
        Vec<T> pull_of_q = kSquared ? g_q * s : g_q;
        if constexpr (!kWhole) pull_of_q = pull_of_q * Vec<T>::loadu(weight_at + first + n * kV);
        const Vec<T> pull = at::vec::fmadd(g_i, Vec<T>::loadu(hot_at + p), pull_of_q);
        const Vec<T> share = Vec<T>::loadu(share_at + p);
        const Vec<T> ce = at::vec::fmsub(Vec<T>::loadu(rest_at + p) + share, s, share);
        at::vec::fmadd(at::vec::fnmadd(s, s, s), pull, g_ce * ce).store(to + p);
      });
    });
  }
}

template <typename T>
void push_sigmoid_gradient(const Tile<T>& tile, bool squared, const T* grad, T* to) {
  if (tile.whole) {
    squared ? push_sigmoid_gradient<true, true>(tile, grad, to) : push_sigmoid_gradient<false, true>(tile, grad, to);
  } else {
    squared ? push_sigmoid_gradient<true, false>(tile, grad, to) : push_sigmoid_gradient<false, false>(tile, grad, to);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
