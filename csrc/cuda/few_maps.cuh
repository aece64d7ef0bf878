// The mixes and the softmax of up to 16 classes, all in registers: x[C][P], P pixels a lane.
//
// A lane reads its own pixels of a row; the weights are the same for all lanes of a warp. Each weight loaded costs the
// load unit as much as a pixel, so P pixels share it (docs/performance.md).
#pragma once

#include "call.h"
#include "numbers.cuh"

namespace lomix::cuda {

template <int C>
constexpr int kPadded = (C + 3) / 4 * 4;

// Logits of a lane's pixels: rows [L][C][S] of a strip, `at` the lane's first pixel in it.
template <typename T, int C, int P>
struct Lane {
  static constexpr int kStrip = kLanes * P;
  const T* rows;

  __device__ __forceinline__ const T* member(int scale) const { return rows + scale * (C * kStrip); }
};

template <typename T, int C, int P>
__device__ __forceinline__ void fill(T (&x)[C][P], T value) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int p = 0; p < P; ++p) x[c][p] = value;
  }
}

// Calls f(j, scale) for member number j of a subset. The loop stays a loop: code must not grow with the subset.
template <typename F>
__device__ __forceinline__ void for_members(unsigned members, const F& f) {
#pragma unroll 1
  for (int j = 0; members != 0; ++j, members &= members - 1) f(j, __ffs(static_cast<int>(members)) - 1);
}

template <typename T, int C, int P>
__device__ __forceinline__ void mix_sum(T (&x)[C][P], const Lane<T, C, P>& lane, unsigned members) {
  fill(x, T(0));
  for_members(members, [&](int, int scale) {
    const T* const from = lane.member(scale);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int p = 0; p < P; ++p) x[c][p] += value.at[p];
    }
  });
}

template <typename T, int C, int P>
__device__ __forceinline__ void mix_mul(T (&x)[C][P], const Lane<T, C, P>& lane, unsigned members) {
  for_members(members, [&](int, int scale) {
    const T* const from = lane.member(scale);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int p = 0; p < P; ++p) x[c][p] *= value.at[p];
    }
  });
}

template <typename T, int N>
__device__ __forceinline__ void load_uniform(T (&to)[N], const T* from) {
  static_assert(N % 4 == 0);
#pragma unroll
  for (int n = 0; n < N; n += 4) {
    const Pack<T, 4> four = load<4>(from + n);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[n + k] = four.at[k];
  }
}

// x_o = b_o + sum over members j and classes c of W_j[o][c] P_j[c].
template <typename T, int C, int P>
__device__ __forceinline__ void mix_cat(T (&x)[C][P], const Lane<T, C, P>& lane, unsigned members,
                                        const T* __restrict__ weight, const T* __restrict__ bias) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const T constant = bias[c];
#pragma unroll
    for (int p = 0; p < P; ++p) x[c][p] = constant;
  }
  for_members(members, [&](int j, int scale) {
    const T* const from = lane.member(scale);
    const T* const matrix = weight + j * (C * kPadded<C>);
#pragma unroll 2
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int o = 0; o < C; o += 4) {
        const Pack<T, 4> four = load<4>(matrix + c * kPadded<C> + o);
#pragma unroll
        for (int k = 0; k < 4 && o + k < C; ++k) {
#pragma unroll
          for (int p = 0; p < P; ++p) x[o + k][p] = fused(four.at[k], value.at[p], x[o + k][p]);
        }
      }
    }
  });
}

// x = sum of a_j P_j, a the softmax over members of u_j . P_j + v_j: in one sweep over the members, which rescales what
// it has whenever a larger score comes up. keep(j, scores) sees the scores, in units of log2; `top` and `inverse` turn
// them into attention: a_j = inverse exp2(score_j - top).
template <typename T, int C, int P, typename F>
__device__ __forceinline__ void mix_awf(T (&x)[C][P], T (&top)[P], T (&inverse)[P], const Lane<T, C, P>& lane,
                                        unsigned members, const T* __restrict__ score, const T* __restrict__ bias,
                                        const F& keep) {
  fill(x, T(0));
#pragma unroll
  for (int p = 0; p < P; ++p) top[p] = lowest<T>(), inverse[p] = T(0);
  for_members(members, [&](int j, int scale) {
    const T* const from = lane.member(scale);
    T w[kPadded<C>], s[P], old[P], e[P];
    load_uniform(w, score + j * kPadded<C>);
    const T constant = bias[j];
#pragma unroll
    for (int p = 0; p < P; ++p) s[p] = constant;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int p = 0; p < P; ++p) s[p] = fused(w[c], value.at[p], s[p]);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      s[p] *= static_cast<T>(kLog2E);
      const T larger_top = larger(top[p], s[p]);
      old[p] = exp2_of(top[p] - larger_top);  // 0 at the first member
      e[p] = exp2_of(s[p] - larger_top);
      top[p] = larger_top;
      inverse[p] = fused(inverse[p], old[p], e[p]);
    }
    keep(j, s);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int p = 0; p < P; ++p) x[c][p] = fused(x[c][p], old[p], e[p] * value.at[p]);
    }
  });
#pragma unroll
  for (int p = 0; p < P; ++p) {
    inverse[p] = quotient(T(1), inverse[p]);
#pragma unroll
    for (int c = 0; c < C; ++c) x[c][p] *= inverse[p];
  }
}

// Logits of a map -> exponentials of the differences from the largest, their sum, and log2 of that of the label.
// The largest has exponent 0 exactly, and so has the label of a pixel that is right: its loss must not be rounding.
template <typename T, int C, int P>
__device__ __forceinline__ void exponentials(T (&x)[C][P], const int (&label)[P], T (&sum)[P], T (&own)[P]) {
  constexpr T kScale = static_cast<T>(kLog2E);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    T top = x[0][p];
#pragma unroll
    for (int c = 1; c < C; ++c) top = larger(top, x[c][p]);
    sum[p] = own[p] = T(0);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T power = (x[c][p] - top) * kScale;
      own[p] = label[p] == c ? power : own[p];
      x[c][p] = exp2_of(power);
      sum[p] += x[c][p];
    }
  }
}

}  // namespace lomix::cuda
