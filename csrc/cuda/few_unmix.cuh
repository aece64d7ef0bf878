// From the gradient of a map, up to 16 classes, to those of its members: each mix the other way around.
#pragma once

#include <type_traits>

#include "few_extra.cuh"
#include "few_maps.cuh"
#include "few_target.cuh"
#include "shapes.h"

namespace lomix::cuda {

// Gradients of a lane's logits. Only constants index the registers, so a member's number is compared with each.
template <typename T, int L, int C, int P>
struct Gradients {
  T at[L][C][P];

  template <typename F>
  __device__ __forceinline__ void add(int scale, const F& value) {
#pragma unroll
    for (int i = 0; i < L; ++i) {
      if (i != scale) continue;
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int p = 0; p < P; ++p) at[i][c][p] += value(c, p);
      }
    }
  }
};

// Logits of a map -> dLoss/dmap, given g = dLoss/dstats of this map [1 + 2C]:
//   t_c = gI_c [y == c] + gQ_c (2 s_c or 1);  d_c = s_c (t_c - sum_k s_k t_k + g_ce) - g_ce [y == c]
template <typename T, int C, int P>
__device__ __forceinline__ void differentiate(T (&x)[C][P], const int (&label)[P], const T* __restrict__ g,
                                              bool squared) {
  T sum[P], unused[P], dot[P], hot[P];
  exponentials(x, label, sum, unused);
  const T two = squared ? T(2) : T(0), one = squared ? T(0) : T(1), g_ce = g[0];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const T inverse = label[p] == kOutside ? T(0) : quotient(T(1), sum[p]);
    const T g_i = label[p] >= 0 ? g[1 + label[p]] : T(0);
    T own = T(0);
    dot[p] = T(0);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T s = x[c][p] * inverse;
      x[c][p] = s;
      dot[p] = fused(s, g[1 + C + c] * fused(s, two, one), dot[p]);
      own += label[p] == c ? s : T(0);
    }
    hot[p] = own * g_i;
    dot[p] = g_ce - (dot[p] + hot[p]);
    hot[p] -= g_ce;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T slope = fused(g[1 + C + c], fused(x[c][p], two, one), dot[p]);
      x[c][p] *= slope;
      x[c][p] += label[p] == c ? hot[p] : T(0);
    }
  }
}

template <int P>
struct Labels {
  int label[P];
};

// Everything of one lane that the maps of a subset need.
template <typename T, int L, int C, int P, bool kGeneral>
struct Pixels {
  static constexpr int kStrip = kLanes * P;
  Lane<T, C, P> lane;
  std::conditional_t<kGeneral, Shares<T, C, P>, Labels<P>> target;
  T* kept;    // [kKept][kStrip] at the lane's pixels
  T* scores;  // [kFewScales][kStrip] likewise
  T* back;    // [C][kStrip] likewise, where the sums of products will be
  Gradients<T, L, C, P> grads;

  __device__ __forceinline__ Pack<T, P> value(int scale, int c) const {
    return load<P>(lane.member(scale) + c * kStrip);
  }
  // Logits of a map -> dLoss/dmap.
  __device__ __forceinline__ void differentiate_map(T (&x)[C][P], const Call<T>& call, const T* g) const {
    if constexpr (kGeneral) {
      differentiate_general(x, target, call, g);
    } else {
      differentiate(x, target.label, g, call.squared);
    }
  }
};

template <typename T, int L, int C, int P, bool kGeneral>
__device__ __forceinline__ void unmix_sum(Pixels<T, L, C, P, kGeneral>& px, const Call<T>& call, const T* g,
                                          unsigned members) {
  T x[C][P];
  mix_sum(x, px.lane, members);
  px.differentiate_map(x, call, g);
  for_members(members, [&](int, int scale) { px.grads.add(scale, [&](int c, int p) { return x[c][p]; }); });
}

// dP_j = d times the product of the other members.
template <typename T, int L, int C, int P, bool kGeneral>
__device__ __forceinline__ void unmix_mul(Pixels<T, L, C, P, kGeneral>& px, const Call<T>& call, const T* g,
                                          unsigned members) {
  T x[C][P];
  fill(x, T(1));
  mix_mul(x, px.lane, members);
  px.differentiate_map(x, call, g);
  for_members(members, [&](int, int scale) {
    T others[C][P];
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int p = 0; p < P; ++p) others[c][p] = x[c][p];
    }
    mix_mul(others, px.lane, members & ~(1u << scale));
    px.grads.add(scale, [&](int c, int p) { return others[c][p]; });
  });
}

// dscore_j = a_j (d . P_j - sum over k of a_k d . P_k);  dP_j = a_j d + dscore_j u_j.
template <typename T, int L, int C, int P, bool kGeneral>
__device__ __forceinline__ void unmix_awf(Pixels<T, L, C, P, kGeneral>& px, const Call<T>& call, const T* g,
                                          const Subset& subset) {
  constexpr int kStrip = kLanes * P;
  const T* const score = call.score + subset.first_pair * kPadded<C>;
  T x[C][P], top[P], inverse[P], mean[P];
  mix_awf(x, top, inverse, px.lane, subset.members, score, call.score_bias + subset.first_pair,
          [&](int j, const T(&s)[P]) {
            Pack<T, P> out;
#pragma unroll
            for (int p = 0; p < P; ++p) out.at[p] = s[p];
            store(px.scores + j * kStrip, out);
          });
  px.differentiate_map(x, call, g);
#pragma unroll
  for (int p = 0; p < P; ++p) mean[p] = T(0);
  for_members(subset.members, [&](int j, int scale) {
    Pack<T, P> attention = load<P>(px.scores + j * kStrip), along;
#pragma unroll
    for (int p = 0; p < P; ++p) along.at[p] = T(0);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = px.value(scale, c);
#pragma unroll
      for (int p = 0; p < P; ++p) along.at[p] = fused(x[c][p], value.at[p], along.at[p]);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      attention.at[p] = inverse[p] * exp2_of(attention.at[p] - top[p]);
      mean[p] = fused(attention.at[p], along.at[p], mean[p]);
    }
    store(px.scores + j * kStrip, attention);
    store(px.kept + j * kStrip, along);
  });
  for_members(subset.members, [&](int j, int scale) {
    const Pack<T, P> attention = load<P>(px.scores + j * kStrip), along = load<P>(px.kept + j * kStrip);
    Pack<T, P> slope;
#pragma unroll
    for (int p = 0; p < P; ++p) slope.at[p] = attention.at[p] * (along.at[p] - mean[p]);
    store(px.scores + j * kStrip, slope);
    const T* const u = score + j * kPadded<C>;
    px.grads.add(scale, [&](int c, int p) { return fused(attention.at[p], x[c][p], slope.at[p] * u[c]); });
  });
}

// dP_j = W_j^T d; d itself is kept for dW.
template <typename T, int L, int C, int P, bool kGeneral>
__device__ __forceinline__ void unmix_cat(Pixels<T, L, C, P, kGeneral>& px, const Call<T>& call, const T* g,
                                          const Subset& subset) {
  constexpr int kStrip = kLanes * P;
  const T* const weight = call.weight + subset.first_pair * (C * kPadded<C>);
  T x[C][P];
  mix_cat(x, px.lane, subset.members, weight, call.bias + subset.index * kPadded<C>);
  px.differentiate_map(x, call, g);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    Pack<T, P> out;
#pragma unroll
    for (int p = 0; p < P; ++p) out.at[p] = x[c][p];
    store(px.kept + c * kStrip, out);
  }
  for_members(subset.members, [&](int j, int scale) {
    // d . column c of W_j
    const auto back = [&](int c) {
      const T* const column = weight + (j * C + c) * kPadded<C>;
      Pack<T, P> sum;
#pragma unroll
      for (int p = 0; p < P; ++p) sum.at[p] = T(0);
#pragma unroll
      for (int o = 0; o < C; o += 4) {
        const Pack<T, 4> four = load<4>(column + o);
#pragma unroll
        for (int k = 0; k < 4 && o + k < C; ++k) {
#pragma unroll
          for (int p = 0; p < P; ++p) sum.at[p] = fused(four.at[k], x[o + k][p], sum.at[p]);
        }
      }
      return sum;
    };
    if constexpr (!kUnrolled<C>) {
      // Left to unroll this, ptxas loads so many weights ahead that it runs out of registers.
#pragma unroll 2
      for (int c = 0; c < C; ++c) store(px.back + c * kStrip, back(c));
      px.grads.add(scale, [&](int c, int p) { return px.back[c * kStrip + p]; });
    } else {
      Pack<T, P> all[C];
#pragma unroll
      for (int c = 0; c < C; ++c) all[c] = back(c);
      px.grads.add(scale, [&](int c, int p) { return all[c].at[p]; });
    }
  });
}

// ---- what only general calls have ----

template <typename T, int L, int C, int P, bool kGeneral>
__device__ __forceinline__ void unmix_linear(Pixels<T, L, C, P, kGeneral>& px, const Call<T>& call, const T* g,
                                             unsigned members, Mix mix) {
  const Factors<T> factors = factors_of<T>(mix, members);
  T x[C][P];
  mix_linear(x, px.lane, members, factors);
  px.differentiate_map(x, call, g);
  for_members(members, [&](int j, int scale) {
    const T factor = j == 0 ? factors.first : factors.other;
    px.grads.add(scale, [&](int c, int p) { return factor * x[c][p]; });
  });
}

// dP_j = d f'(P_j) times f of the other members.
template <typename T, int L, int C, int P, bool kGeneral>
__device__ __forceinline__ void unmix_bounded(Pixels<T, L, C, P, kGeneral>& px, const Call<T>& call, const T* g,
                                              unsigned members) {
  const bool is_bounded = call.target.bounded;
  T x[C][P];
  fill(x, T(1));
  mix_bounded(x, px.lane, members, is_bounded);
  px.differentiate_map(x, call, g);
  for_members(members, [&](int, int scale) {
    T others[C][P];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = px.value(scale, c);
#pragma unroll
      for (int p = 0; p < P; ++p) others[c][p] = is_bounded ? x[c][p] * bounded_of(value.at[p]).slope : x[c][p];
    }
    mix_bounded(others, px.lane, members & ~(1u << scale), is_bounded);
    px.grads.add(scale, [&](int c, int p) { return others[c][p]; });
  });
}

// All of d to the member that is the largest.
template <typename T, int L, int C, int P, bool kGeneral>
__device__ __forceinline__ void unmix_max(Pixels<T, L, C, P, kGeneral>& px, const Call<T>& call, const T* g,
                                          unsigned members) {
  T x[C][P];
  Winners<C, P> winners;
  fill(x, T(0));
  mix_max(x, winners, px.lane, members);
  px.differentiate_map(x, call, g);
  for_members(members, [&](int, int scale) {
    px.grads.add(scale, [&](int c, int p) { return winners.is(c, p, scale) ? x[c][p] : T(0); });
  });
}

}  // namespace lomix::cuda
