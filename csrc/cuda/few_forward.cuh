// Statistics of all maps, up to 16 classes: a block stages a tile in shared memory, then each of its warps takes a map
// and sweeps the tile, so that the 1 + 2C sums of a map are added up over lanes once a tile, not once a pixel.
#pragma once

#include "few_extra.cuh"
#include "few_maps.cuh"
#include "few_target.cuh"
#include "shapes.h"
#include "tile.cuh"

namespace lomix::cuda {

template <bool kGeneral, typename T, int C, int P>
__device__ __forceinline__ void make_map(T (&x)[C][P], const Call<T>& call, const Map& map, const Lane<T, C, P>& lane) {
  const int index = map.code & ((1 << kMixShift) - 1), pair = map.first_pair;
  const Mix mix = static_cast<Mix>(map.code >> kMixShift);
  if constexpr (kGeneral) {
    if (mix == Mix::kMax) {
      Winners<C, P> unused;
      fill(x, T(0));
      mix_max(x, unused, lane, map.members);
      return;
    }
    if (mix == Mix::kMul) {
      fill(x, T(1));
      mix_bounded(x, lane, map.members, call.target.bounded);
      return;
    }
    if (mix != Mix::kCat && mix != Mix::kAwf) {
      mix_linear(x, lane, map.members, factors_of<T>(mix, map.members));
      return;
    }
  }
  switch (mix) {
    case Mix::kMul:
      fill(x, T(1));
      mix_mul(x, lane, map.members);
      break;
    case Mix::kCat:
      mix_cat(x, lane, map.members, call.weight + pair * (C * kPadded<C>), call.bias + index * kPadded<C>);
      break;
    case Mix::kAwf: {
      T top[P], inverse[P];
      mix_awf(x, top, inverse, lane, map.members, call.score + pair * kPadded<C>, call.score_bias + pair,
              [](int, const T(&)[P]) {});
      break;
    }
    default: mix_sum(x, lane, map.members);
  }
}

// One map over all strips of a tile, its sums added to those of the item's earlier tiles. `kept`: the item, two numbers
// that do not matter here, and whether the tile is the item's first.
template <typename T, int C, int P, bool kGeneral>
__device__ __forceinline__ void sweep_map(const Call<T>& call, const Map& map, const T* rows, const int* labels,
                                          const T* targets, const int* kept) {
  constexpr int kStrip = kLanes * P;
  const int lane = lane_of();
  T loss = 0, found[2 * C];  // I_c, then Q_c
#pragma unroll
  for (int k = 0; k < 2 * C; ++k) found[k] = T(0);
  const bool squared = call.squared;
#pragma unroll 1
  for (int strip = 0; strip < call.tiling.strips; ++strip) {
    const Lane<T, C, P> at{rows + strip * call.num_scales * (C * kStrip) + lane * P};
    const Pack<int, P> label = load<P>(labels + strip * kStrip + lane * P);
    T x[C][P], sum[P], own[P];
    make_map<kGeneral>(x, call, map, at);
    if constexpr (kGeneral) {
      const bool dense = call.target.dense;
      Shares<T, C, P> shares{targets + strip * ((2 + (dense ? C : 0)) * kStrip) + lane * P, {}, dense};
#pragma unroll
      for (int p = 0; p < P; ++p) shares.label[p] = label.at[p];
      add_general(x, shares, call, loss, found);
      continue;
    }
    exponentials(x, label.at, sum, own);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const T inverse = label.at[p] == kOutside ? T(0) : quotient(T(1), sum[p]);
      if (label.at[p] >= 0) loss += log2_of(sum[p]) - own[p];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const T s = x[c][p] * inverse;
        found[c] += label.at[p] == c ? s : T(0);  // with `if`, nvcc indexes an array in memory
        found[C + c] = fused(s, squared ? s : T(1), found[C + c]);
      }
    }
  }
  loss = lane_sum(loss) * (kGeneral ? T(1) : static_cast<T>(kLn2));
  const T mine = lane_sums<kLanes / 2>(found, lane);
  const bool is_first = kept[3] != 0;
  T* const to = call.partial + (static_cast<int64_t>(kept[0]) * call.num_maps + map.number) * (1 + 2 * C);
  if (lane == 0) to[0] = is_first ? loss : to[0] + loss;
  if (lane < 2 * C) to[1 + lane] = is_first ? mine : to[1 + lane] + mine;
}

template <typename T, int C, bool kGeneral>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<C>)
    statistics_few(const __grid_constant__ Call<T> call) {
  constexpr int P = kForwardPixels<C, kGeneral>, kStrip = kLanes * P;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Tiling& tiling = call.tiling;
  const int pixels = tiling.strips * kStrip;
  T* const rows = reinterpret_cast<T*>(shared_memory);  // [strips][L][C][kStrip]
  const int target_rows = kGeneral ? 2 + (call.target.dense ? C : 0) : 0;
  T* const targets = rows + pixels * call.num_scales * C;                      // [strips][target_rows][kStrip]
  int* const labels = reinterpret_cast<int*>(targets + pixels * target_rows);  // [pixels]
  const int length = axis_length(tiling);
  const AxisTables<T> axes{reinterpret_cast<T*>(labels + pixels),
                           reinterpret_cast<int*>(labels + pixels) + length * call.num_scales, length};
  int* const counts = axes.low + length * call.num_scales;  // [1 + C]
  int* const next = counts + 1 + C;                         // the first map that no warp has taken
  // What is needed again after the maps: in shared memory it takes no registers meanwhile.
  int* const kept = next + 1;
  const int lane = lane_of(), warp = warp_of();
#pragma unroll 1
  for (int item = blockIdx.x; item < tiling.items; item += gridDim.x) {
    const int first = item % tiling.chunks * tiling.chunk_tiles;
    int last = min(first + tiling.chunk_tiles, tiling.per_sample);
    if (threadIdx.x <= C) counts[threadIdx.x] = 0;
#pragma unroll 1
    for (int number = first; number < last; ++number) {
      const Tile tile = tile_at(call, item, number);
      fill_axes(call, tile, axes);
      if (threadIdx.x == 0) {
        *next = kForwardThreads / kLanes;
        kept[0] = item, kept[1] = number, kept[2] = last, kept[3] = number == first;
      }
      __syncthreads();
      stage_logits<C, kStrip>(call, tile, axes, rows);
      for (int p = threadIdx.x; p < pixels; p += kForwardThreads) {
        if constexpr (kGeneral) {
          T* const own = targets + p / kStrip * (target_rows * kStrip) + p % kStrip;
          labels[p] = store_target<kStrip>(call, tile, p, own);
          if (labels[p] == kShares) continue;
        } else {
          labels[p] = tile_label(call, tile, p);
        }
        if (labels[p] != kOutside) atomicAdd(&counts[1 + labels[p]], 1);  // integers: any order gives the same
      }
      __syncthreads();
      for (int m = warp; m < call.num_maps;) {
        sweep_map<T, C, P, kGeneral>(call, call.maps[m], rows, labels, targets, kept);
        int taken = 0;
        if (lane == 0) taken = atomicAdd(next, 1);
        m = __shfl_sync(kAllLanes, taken, 0);
      }
      item = kept[0], number = kept[1], last = kept[2];
      __syncthreads();
    }
    if (threadIdx.x <= C) call.counts[item * (1 + C) + threadIdx.x] = counts[threadIdx.x];
    // The next item's counts are set to 0 by the threads that have just read them.
  }
}

}  // namespace lomix::cuda
