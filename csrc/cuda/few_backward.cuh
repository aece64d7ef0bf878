// Gradients of all maps, up to 16 classes: lanes own pixels and hold the L*C gradients of their logits in registers; a
// warp owns a strip. Parameter gradients are small matrix products over the strip, summed over the warps of the block.
#pragma once

#include "adjoint.cuh"
#include "few_unmix.cuh"

namespace lomix::cuda {

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

template <typename T, int P>
__device__ __forceinline__ void clear_rows(T* rows, int count) {
  Pack<T, P> zeros;
#pragma unroll
  for (int p = 0; p < P; ++p) zeros.at[p] = T(0);
  for (int r = 0; r < count; ++r) store(rows + r * (kLanes * P), zeros);
}

// L: as many scales as the registers hold, at least those of the call.
template <typename T, int L, int C, bool kGeneral>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<L, C, kGeneral>)
    gradients_few(const __grid_constant__ Call<T> call) {
  constexpr int P = kBackwardPixels<L, C, kGeneral>, kStrip = kLanes * P, kPair = (C + 1) * (C + 1);
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Tiling& tiling = call.tiling;
  const int lane = lane_of(), warp = warp_of(), strip_rows = call.num_scales * (C * kStrip);
  T* const rows = reinterpret_cast<T*>(shared_memory);  // [warps][L][C][kStrip], a strip a warp
  T* const rest = rows + kBackwardWarps * strip_rows;   // [warps][rest_rows][kStrip]
  // Rows of `rest` a warp; after those of every call the target's.
  const int rest_rows = kKept<C> + kFewScales + (kGeneral ? 2 + (call.target.dense ? C : 0) : 0);
  T* const sums =
      rest + kBackwardWarps * (rest_rows * kStrip);  // [warps][warp_sums]: [members][C + 1][C + 1] or [C][kStrip]
  const int length = axis_length(tiling);
  T* const after = sums + kBackwardWarps * call.warp_sums;
  const AxisTables<T> axes{after, reinterpret_cast<int*>(after + length * call.num_scales), length};
  // What is needed again after the maps: in shared memory it takes no registers meanwhile.
  int* const kept_tile = axes.low + length * call.num_scales;
  T* const own_rows = rows + warp * strip_rows;
  T* const own_kept = rest + warp * (rest_rows * kStrip);
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
      Pixels<T, L, C, P, kGeneral> px;
      px.lane.rows = own_rows + lane * P;
      px.kept = own_kept + lane * P;
      px.scores = px.kept + kKept<C> * kStrip;
      px.back = own_sums + lane * P;
      if constexpr (kGeneral) {
        T* const own_target = px.scores + kFewScales * kStrip;
        px.target.rows = own_target;
        px.target.dense = call.target.dense;
#pragma unroll
        for (int p = 0; p < P; ++p) {
          px.target.label[p] = store_target<kStrip>(call, tile, warp * kStrip + lane * P + p, own_target + p);
        }
      } else {
#pragma unroll
        for (int p = 0; p < P; ++p) px.target.label[p] = tile_label(call, tile, warp * kStrip + lane * P + p);
      }
#pragma unroll
      for (int i = 0; i < L; ++i) fill(px.grads.at[i], T(0));
      __syncthreads();
#pragma unroll 1
      for (int s = 0; s < call.num_subsets; ++s) {
        const Subset& subset = call.subsets[s];
        const T* const pull = call.grad_stats + static_cast<int64_t>(kept_tile[0]) * call.num_maps * (1 + 2 * C);
        const auto of = [&](Mix mix) { return pull + subset.number[static_cast<int>(mix)] * (1 + 2 * C); };
        const auto has = [&](Mix mix) { return subset.number[static_cast<int>(mix)] != kNoMap; };
        if constexpr (kGeneral) {
#pragma unroll 1
          for (int k = 0; k < 3; ++k) {
            const Mix mix = k == 0 ? Mix::kSum : k == 1 ? Mix::kSub : Mix::kAvg;  // a list of them would lie in memory
            if (has(mix)) unmix_linear(px, call, of(mix), subset.members, mix);
          }
          if (has(Mix::kMul)) unmix_bounded(px, call, of(Mix::kMul), subset.members);
          if (has(Mix::kMax)) unmix_max(px, call, of(Mix::kMax), subset.members);
        } else {
          if (has(Mix::kSum)) unmix_sum(px, call, of(Mix::kSum), subset.members);
          if (has(Mix::kMul)) unmix_mul(px, call, of(Mix::kMul), subset.members);
        }
        if (has(Mix::kAwf)) unmix_awf(px, call, of(Mix::kAwf), subset);
        if (has(Mix::kCat)) unmix_cat(px, call, of(Mix::kCat), subset);
        if (!has(Mix::kAwf) && !has(Mix::kCat)) continue;
        // What a plan lacks has a gradient of 0.
        if (!has(Mix::kAwf)) clear_rows<T, P>(px.scores, kFewScales);
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
