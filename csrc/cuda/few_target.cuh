// What general calls do with a map of up to 16 classes, all in registers: sums of a map and its gradient, for any
// target, weights, and sigmoid as well as softmax.
#pragma once

#include "few_maps.cuh"
#include "shapes.h"
#include "target.cuh"

namespace lomix::cuda {

// The target of a lane's pixels, in shared memory [target_rows][kStrip], at the lane's first pixel.
template <typename T, int C, int P>
struct Shares {
  static constexpr int kStrip = kLanes * P;
  const T* rows;
  int label[P];
  bool dense;

  __device__ __forceinline__ Pack<T, P> dice() const { return load<P>(rows); }
  __device__ __forceinline__ Pack<T, P> ce() const { return load<P>(rows + kStrip); }

  __device__ __forceinline__ Pack<T, P> of_class(int c) const {
    if (dense) return load<P>(rows + (2 + c) * kStrip);
    Pack<T, P> y;
#pragma unroll
    for (int p = 0; p < P; ++p) y.at[p] = label[p] == c ? T(1) : T(0);
    return y;
  }
};

// Logits of a map -> its softmax. each(c, p, power) sees log2 of a probability, but for `log_sum`.
template <typename T, int C, int P, typename F>
__device__ __forceinline__ void softmax(T (&x)[C][P], T (&log_sum)[P], const F& each) {
  constexpr T kScale = static_cast<T>(kLog2E);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    T top = x[0][p], sum = T(0);
#pragma unroll
    for (int c = 1; c < C; ++c) top = larger(top, x[c][p]);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T power = (x[c][p] - top) * kScale;
      each(c, p, power);
      x[c][p] = exp2_of(power);
      sum += x[c][p];
    }
    const T inverse = quotient(T(1), sum);
#pragma unroll
    for (int c = 0; c < C; ++c) x[c][p] *= inverse;
    log_sum[p] = sum;
  }
}

// Adds the sums of a map: `loss`, and I_c and Q_c to `found`.
template <typename T, int C, int P>
__device__ __forceinline__ void add_general(T (&x)[C][P], const Shares<T, C, P>& shares, const Call<T>& call, T& loss,
                                            T (&found)[2 * C]) {
  const Target<T>& target = call.target;
  const bool squared = call.squared;
  T lost[P];
#pragma unroll
  for (int p = 0; p < P; ++p) lost[p] = T(0);
  if (target.sigmoid) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> y = shares.of_class(c);
      const T weight = target.ce_weight[c];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const Sigmoid<T> s = sigmoid_of(x[c][p]);
        lost[p] += sigmoid_loss(x[c][p], s.small, y.at[p], share_of(target, weight, y.at[p]));
        x[c][p] = s.value;
      }
    }
  } else {
    T whole[P], sum[P];
#pragma unroll
    for (int p = 0; p < P; ++p) whole[p] = T(0);
    softmax(x, sum, [&](int c, int p, T power) {
      const T share = share_of(target, target.ce_weight[c], shares.of_class(c).at[p]);
      whole[p] += share;
      // Not even minus infinity counts where the share is 0.
      lost[p] -= share == T(0) ? T(0) : share * power;
    });
    const Pack<T, P> ce = shares.ce();
#pragma unroll
    for (int p = 0; p < P; ++p) {
      lost[p] = fused(whole[p], log2_of(sum[p]), lost[p]) * static_cast<T>(kLn2);
      if (ce.at[p] == T(0) && lost[p] == static_cast<T>(INFINITY)) lost[p] = T(0);  // nor where the weight is
    }
  }
  const Pack<T, P> dice = shares.dice(), ce = shares.ce();
#pragma unroll
  for (int p = 0; p < P; ++p) loss = fused(ce.at[p], lost[p], loss);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const Pack<T, P> y = shares.of_class(c);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const T weighted = dice.at[p] * x[c][p];
      found[c] = fused(weighted, y.at[p], found[c]);
      found[C + c] = fused(weighted, squared ? x[c][p] : T(1), found[C + c]);
    }
  }
}

// Logits of a map -> dLoss/dmap, given g = dLoss/dstats of this map [1 + 2C]. With w the weights, t_c the shares and
// pull_c = gI_c y_c + gQ_c (2 s_c or 1):
//   softmax: d_c = g_ce w_ce (s_c sum_k t_k - t_c) + w s_c (pull_c - sum_k s_k pull_k)
//   sigmoid: d_c = g_ce w_ce ((1 - y_c + t_c) s_c - t_c) + w s_c (1 - s_c) pull_c
template <typename T, int C, int P>
__device__ __forceinline__ void differentiate_general(T (&x)[C][P], const Shares<T, C, P>& shares, const Call<T>& call,
                                                      const T* __restrict__ g) {
  const Target<T>& target = call.target;
  const T two = call.squared ? T(2) : T(0), one = call.squared ? T(0) : T(1), g_ce = g[0];
  const Pack<T, P> dice = shares.dice(), ce = shares.ce();
  T loss[P];
#pragma unroll
  for (int p = 0; p < P; ++p) loss[p] = g_ce * ce.at[p];
  if (target.sigmoid) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> y = shares.of_class(c);
      const T weight = target.ce_weight[c], g_i = g[1 + c], g_q = g[1 + C + c];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const Sigmoid<T> s = sigmoid_of(x[c][p]);
        const T share = share_of(target, weight, y.at[p]);
        const T pull = fused(g_i, y.at[p], g_q * fused(s.value, two, one));
        x[c][p] = fused(loss[p], fused(T(1) - y.at[p] + share, s.value, -share), dice.at[p] * s.slope * pull);
      }
    }
    return;
  }
  T dot[P], whole[P], unused[P];
#pragma unroll
  for (int p = 0; p < P; ++p) dot[p] = whole[p] = T(0);
  softmax(x, unused, [](int, int, T) {});
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const Pack<T, P> y = shares.of_class(c);
    const T weight = target.ce_weight[c], g_i = g[1 + c], g_q = g[1 + C + c];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      whole[p] += share_of(target, weight, y.at[p]);
      dot[p] = fused(x[c][p], fused(g_i, y.at[p], g_q * fused(x[c][p], two, one)), dot[p]);
    }
  }
#pragma unroll
  for (int p = 0; p < P; ++p) dot[p] = fused(loss[p], whole[p], -dice.at[p] * dot[p]);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const Pack<T, P> y = shares.of_class(c);
    const T weight = target.ce_weight[c], g_i = g[1 + c], g_q = g[1 + C + c];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const T pull = fused(g_i, y.at[p], g_q * fused(x[c][p], two, one));
      const T slope = fused(dice.at[p], pull, dot[p]);
      x[c][p] = fused(x[c][p], slope, -loss[p] * share_of(target, weight, y.at[p]));
    }
  }
}

}  // namespace lomix::cuda
