// Gradients of all maps, up to 16 classes: lanes own pixels and hold the L*C gradients of their logits in registers; a
// warp owns a strip. Parameter gradients are small matrix products over the strip, summed over the warps of the block.
#pragma once

#include "adjoint.cuh"
#include "few_maps.cuh"
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

// Products of the rows d[o] and score[j] of a strip with the logits of one or two members of a subset, summed over the
// strip. Lane (group, c) sums column c for the rows of its group. Lanes begin at different pixels, so that no two of
// them read the same bank at once.
template <int N, typename T, int C, int P>
__device__ __forceinline__ void multiply(const T* strip, const T* kept, const T* scores, const int (&scale)[2], int j,
                                         bool with_bias, T* to) {
  constexpr int kStrip = kLanes * P, kSide = C + 1, kGroups = kLanes / C, kRows = (C + kGroups - 1) / kGroups;
  const int lane = lane_of(), group = min(lane / C, kGroups - 1), c = lane % C;
  T sum[N][kRows] = {}, bias[kRows] = {}, u[N] = {}, v[N] = {};
#pragma unroll 1
  for (int t = 0; t < kStrip / 4; ++t) {
    const int at = (t + lane) % (kStrip / 4) * 4;
    Pack<T, 4> member[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      member[n] = load<4>(strip + (scale[n] * C + c) * kStrip + at);
      const Pack<T, 4> d = load<4>(scores + (j + n) * kStrip + at);
#pragma unroll
      for (int k = 0; k < 4; ++k) u[n] = fused(d.at[k], member[n].at[k], u[n]), v[n] += d.at[k];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Pack<T, 4> d = load<4>(kept + min(group * kRows + r, C - 1) * kStrip + at);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        bias[r] += d.at[k];
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n][r] = fused(d.at[k], member[n].at[k], sum[n][r]);
      }
    }
  }
  if (lane >= kGroups * C) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    T* const own = to + (j + n) * (kSide * kSide);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = group * kRows + r;
      if (row >= C) continue;
      own[row * kSide + c] = sum[n][r];
      if (c == 0) own[row * kSide + C] = with_bias && n == 0 ? bias[r] : T(0);
    }
    if (group == 0) own[C * kSide + c] = u[n];
    if (lane == 0) own[C * kSide + C] = v[n];
  }
}

// Everything of one lane that the maps of a subset need.
template <typename T, int L, int C, int P>
struct Pixels {
  static constexpr int kStrip = kLanes * P;
  Lane<T, C, P> lane;
  int label[P];
  T* kept;    // [kKept][kStrip] at the lane's pixels
  T* scores;  // [kMaxScales][kStrip] likewise
  T* back;    // [C][kStrip] likewise, where the sums of products will be
  Gradients<T, L, C, P> grads;

  __device__ __forceinline__ Pack<T, P> value(int scale, int c) const {
    return load<P>(lane.member(scale) + c * kStrip);
  }
};

template <typename T, int L, int C, int P>
__device__ __forceinline__ void unmix_sum(Pixels<T, L, C, P>& px, const Call<T>& call, const T* g, unsigned members) {
  T x[C][P];
  mix_sum(x, px.lane, members);
  differentiate(x, px.label, g, call.squared);
  for_members(members, [&](int, int scale) { px.grads.add(scale, [&](int c, int p) { return x[c][p]; }); });
}

// dP_j = d times the product of the other members.
template <typename T, int L, int C, int P>
__device__ __forceinline__ void unmix_mul(Pixels<T, L, C, P>& px, const Call<T>& call, const T* g, unsigned members) {
  T x[C][P];
  fill(x, T(1));
  mix_mul(x, px.lane, members);
  differentiate(x, px.label, g, call.squared);
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
template <typename T, int L, int C, int P>
__device__ __forceinline__ void unmix_awf(Pixels<T, L, C, P>& px, const Call<T>& call, const T* g,
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
  differentiate(x, px.label, g, call.squared);
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
template <typename T, int L, int C, int P>
__device__ __forceinline__ void unmix_cat(Pixels<T, L, C, P>& px, const Call<T>& call, const T* g,
                                          const Subset& subset) {
  constexpr int kStrip = kLanes * P;
  const T* const weight = call.weight + subset.first_pair * (C * kPadded<C>);
  T x[C][P];
  mix_cat(x, px.lane, subset.members, weight, call.bias + subset.index * kPadded<C>);
  differentiate(x, px.label, g, call.squared);
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

template <typename T, int P>
__device__ __forceinline__ void clear_rows(T* rows, int count) {
  Pack<T, P> zeros;
#pragma unroll
  for (int p = 0; p < P; ++p) zeros.at[p] = T(0);
  for (int r = 0; r < count; ++r) store(rows + r * (kLanes * P), zeros);
}

// L: as many scales as the registers hold, at least those of the call.
template <typename T, int L, int C>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<L, C>)
    gradients_few(const __grid_constant__ Call<T> call) {
  constexpr int P = kBackwardPixels<L, C>, kStrip = kLanes * P, kPair = (C + 1) * (C + 1);
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Tiling& tiling = call.tiling;
  const int lane = lane_of(), warp = warp_of(), strip_rows = call.num_scales * (C * kStrip);
  T* const rows = reinterpret_cast<T*>(shared_memory);  // [warps][L][C][kStrip], a strip a warp
  T* const rest = rows + kBackwardWarps * strip_rows;   // [warps][kKept + kMaxScales][kStrip]
  T* const sums = rest + kBackwardWarps * ((kKept<C> + kMaxScales) *
                                           kStrip);  // [warps][warp_sums]: [members][C + 1][C + 1] or [C][kStrip]
  const int length = axis_length(tiling);
  T* const after = sums + kBackwardWarps * call.warp_sums;
  const AxisTables<T> axes{after, reinterpret_cast<int*>(after + length * call.num_scales), length};
  // What is needed again after the maps: in shared memory it takes no registers meanwhile.
  int* const kept_tile = axes.low + length * call.num_scales;
  T* const own_rows = rows + warp * strip_rows;
  T* const own_kept = rest + warp * ((kKept<C> + kMaxScales) * kStrip);
  T* const own_sums = sums + warp * call.warp_sums;
  T* const room = call.room_in_shared ? rest : call.scratch + blockIdx.x * call.scratch_size;
  T* const products = call.products + static_cast<int64_t>(blockIdx.x) * call.num_pairs * kPair;
  if (call.learned) {
    for (int e = threadIdx.x; e < call.num_pairs * kPair; e += kBackwardThreads) products[e] = T(0);
  }
#pragma unroll 1
  for (int item = blockIdx.x; item < tiling.items; item += gridDim.x) {
    const int first = item % tiling.chunks * tiling.chunk_tiles;
    int last = min(first + tiling.chunk_tiles, tiling.per_sample);
#pragma unroll 1
    for (int number = first; number < last; ++number) {
      const Tile tile = tile_at(call, item, number);
      fill_axes(call, tile, axes);
      if (threadIdx.x == 0) {
        kept_tile[0] = static_cast<int>(tile.sample), kept_tile[1] = tile.number;
        kept_tile[2] = tile.origin.z, kept_tile[3] = tile.origin.y, kept_tile[4] = tile.origin.x;
        kept_tile[5] = item, kept_tile[6] = number, kept_tile[7] = last;
      }
      __syncthreads();
      stage_logits<C, kStrip>(call, tile, axes, rows);
      Pixels<T, L, C, P> px;
      px.lane.rows = own_rows + lane * P;
      px.kept = own_kept + lane * P;
      px.scores = px.kept + kKept<C> * kStrip;
      px.back = own_sums + lane * P;
#pragma unroll
      for (int p = 0; p < P; ++p) px.label[p] = tile_label(call, tile, warp * kStrip + lane * P + p);
#pragma unroll
      for (int i = 0; i < L; ++i) fill(px.grads.at[i], T(0));
      __syncthreads();
#pragma unroll 1
      for (int s = 0; s < call.num_subsets; ++s) {
        const Subset& subset = call.subsets[s];
        const T* const pull = call.grad_stats + static_cast<int64_t>(kept_tile[0]) * call.num_maps * (1 + 2 * C);
        const auto of = [&](Mix mix) { return pull + subset.number[static_cast<int>(mix)] * (1 + 2 * C); };
        const auto has = [&](Mix mix) { return subset.number[static_cast<int>(mix)] != kNoMap; };
        if (has(Mix::kSum)) unmix_sum(px, call, of(Mix::kSum), subset.members);
        if (has(Mix::kMul)) unmix_mul(px, call, of(Mix::kMul), subset.members);
        if (has(Mix::kAwf)) unmix_awf(px, call, of(Mix::kAwf), subset);
        if (has(Mix::kCat)) unmix_cat(px, call, of(Mix::kCat), subset);
        if (!has(Mix::kAwf) && !has(Mix::kCat)) continue;
        // What a plan lacks has a gradient of 0.
        if (!has(Mix::kAwf)) clear_rows<T, P>(px.scores, kMaxScales);
        if (!has(Mix::kCat)) clear_rows<T, P>(px.kept, C);
        __syncwarp();
        unsigned members = subset.members;
        const int count = __popc(members);
#pragma unroll 1
        for (int j = 0; j < count; j += 2) {
          int scale[2];
          scale[0] = __ffs(static_cast<int>(members)) - 1;
          members &= members - 1;
          scale[1] = __ffs(static_cast<int>(members)) - 1;
          members &= members - 1;
          if (j + 1 < count) {
            multiply<2, T, C, P>(own_rows, own_kept, own_kept + kKept<C> * kStrip, scale, j, j == 0, own_sums);
          } else {
            multiply<1, T, C, P>(own_rows, own_kept, own_kept + kKept<C> * kStrip, scale, j, j == 0, own_sums);
          }
        }
        __syncthreads();
        T* const to = products + subset.first_pair * kPair;
        for (int e = threadIdx.x; e < count * kPair; e += kBackwardThreads) {
          T sum = T(0);
#pragma unroll
          for (int w = 0; w < kBackwardWarps; ++w) sum += sums[w * call.warp_sums + e];
          to[e] += sum + poison_of(call, kept_tile[0]);
        }
        __syncthreads();
      }
      // After the last product came a barrier: from here on lanes read nothing but their own pixels.
      const Tile done{kept_tile[0], kept_tile[1], {kept_tile[2], kept_tile[3], kept_tile[4]}};
      const T poison = poison_of(call, kept_tile[0]);
#pragma unroll
      for (int i = 0; i < L; ++i) {
        if (i >= call.num_scales) continue;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          Pack<T, P> out;
#pragma unroll
          for (int p = 0; p < P; ++p) out.at[p] = px.grads.at[i][c][p] + poison;
          store(own_rows + (i * C + c) * kStrip + lane * P, out);
        }
      }
      __syncthreads();
      finish_tile<kStrip>(call, done, axes, rows, room);
      item = kept_tile[5], number = kept_tile[6], last = kept_tile[7];
      __syncthreads();
    }
  }
}

}  // namespace lomix::cuda
