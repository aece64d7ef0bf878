// Statistics of all maps for any number of classes; the class-tiled sibling of few_forward.cuh.
#pragma once

#include "many_maps.cuh"

namespace lomix::cuda {

// Cross-entropy of a pixel, unweighted.
template <typename T>
__device__ T loss_of(const ManyLane<T>& px, const Softmax<T>& all) {
  const int classes = px.call->num_classes;
  if (!px.call->general) {
    return px.label >= 0 ? (log2_of(all.sum) - exponent(px, all, px.label)) * static_cast<T>(kLn2) : T(0);
  }
  T loss = T(0), whole = T(0);
  const bool sigmoid = px.call->target.sigmoid;
  for (int c = 0; c < classes; ++c) {
    const T y = px.target(c), share = px.share(c, y);
    if (sigmoid) {
      const T x = px.map[c * kLanes];
      loss += sigmoid_loss(x, sigmoid_of(x).small, y, share);
    } else {
      whole += share;
      loss -= share == T(0) ? T(0) : share * exponent(px, all, c);  // not even minus infinity counts there
    }
  }
  if (sigmoid) return loss;
  loss = fused(whole, log2_of(all.sum), loss) * static_cast<T>(kLn2);
  return px.ce() == T(0) && loss == static_cast<T>(INFINITY) ? T(0) : loss;  // nor where the weight is 0
}

// One map over all strips of a tile. Sums of a few classes at a time go to memory strip by strip. `targets` has
// target_rows for each.
template <typename T>
__device__ void sweep_many(const Call<T>& call, const Map& map, const T* rows, T* own, const int* labels,
                           const T* targets, int target_rows, T* sums, bool is_first) {
  const int lane = lane_of(), classes = call.num_classes;
  const T square = call.squared ? T(1) : T(0), linear = call.squared ? T(0) : T(1);
  T* const to = sums + map.number * (1 + 2 * classes);
  T loss = T(0);
  for (int strip = 0; strip < call.tiling.strips; ++strip) {
    const int at = strip * kLanes + lane;
    const ManyLane<T> px{&call,
                         rows + strip * call.num_scales * classes * kLanes + lane,
                         own + lane,
                         own + classes * kLanes + lane,
                         targets + strip * target_rows * kLanes + lane,
                         labels[at]};
    const T dice = px.dice();
    const Softmax<T> all = make_whole(px, static_cast<Mix>(map.code >> kMixShift), map.members,
                                      map.code & ((1 << kMixShift) - 1), map.first_pair);
    loss = fused(px.ce(), loss_of(px, all), loss);
    const T inverse = px.label == kOutside ? T(0) : quotient(T(1), all.sum);
    for (int c0 = 0; c0 < classes; c0 += kChunk) {
      T found[2 * kChunk];
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        const int c = min(c0 + k, classes - 1);
        const T s = c0 + k < classes ? probability(px, all, inverse, c).value : T(0), weighted = dice * s;
        found[k] = call.target.dense ? weighted * px.target(c) : px.label == c0 + k ? weighted : T(0);
        found[kChunk + k] = weighted * fused(s, square, linear);
      }
      const T mine = lane_sums<kLanes / 2>(found, lane);
      const int c = c0 + lane % kChunk;
      if (lane < 2 * kChunk && c < classes) {
        T& sum = to[1 + c + (lane < kChunk ? 0 : classes)];
        sum = is_first && strip == 0 ? mine : sum + mine;
      }
    }
  }
  loss = lane_sum(loss);
  if (lane == 0) to[0] = is_first ? loss : to[0] + loss;
}

template <typename T>
__global__ void __launch_bounds__(kManyThreads, kManyBlocks) statistics_many(const __grid_constant__ Call<T> call) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Tiling& tiling = call.tiling;
  const int classes = call.num_classes, pixels = tiling.strips * kLanes, length = axis_length(tiling);
  const AxisTables<T> axes{reinterpret_cast<T*>(shared_memory),
                           reinterpret_cast<int*>(reinterpret_cast<T*>(shared_memory) + length * call.num_scales),
                           length};
  int* const labels = axes.low + length * call.num_scales;        // [pixels]
  int* const counts = labels + pixels;                            // [1 + C]
  int* const next = counts + 1 + classes;                         // the first map that no warp has taken
  T* const rows = call.scratch + blockIdx.x * call.scratch_size;  // [strips][L][C][32]
  const int target_rows = (call.general ? 2 : 0) + (call.target.dense ? classes : 0);
  T* const targets = rows + pixels * call.num_scales * classes;  // [strips][target_rows][32]
  T* const own = targets + pixels * target_rows + warp_of() * ((classes + kMaxScales) * kLanes);
  for (int item = blockIdx.x; item < tiling.items; item += gridDim.x) {
    const int first = item % tiling.chunks * tiling.chunk_tiles;
    const int last = min(first + tiling.chunk_tiles, tiling.per_sample);
    T* const sums = call.partial + static_cast<int64_t>(item) * call.num_maps * (1 + 2 * classes);
    for (int c = threadIdx.x; c <= classes; c += kManyThreads) counts[c] = 0;
    for (int number = first; number < last; ++number) {
      const Tile tile = tile_at(call, item, number);
      fill_axes(call, tile, axes);
      if (threadIdx.x == 0) *next = kManyWarps;
      __syncthreads();
      stage_logits<0, kLanes>(call, tile, axes, rows);
      for (int p = threadIdx.x; p < pixels; p += kManyThreads) {
        labels[p] = many_label(call, tile, p, targets + p / kLanes * (target_rows * kLanes) + p % kLanes);
        if (labels[p] >= kBad) atomicAdd(&counts[1 + labels[p]], 1);
      }
      __syncthreads();
      for (int m = warp_of(); m < call.num_maps;) {
        sweep_many(call, call.maps[m], rows, own, labels, targets, target_rows, sums, number == first);
        int taken = 0;
        if (lane_of() == 0) taken = atomicAdd(next, 1);
        m = __shfl_sync(kAllLanes, taken, 0);
      }
      __syncthreads();
    }
    for (int c = threadIdx.x; c <= classes; c += kManyThreads) call.counts[item * (1 + classes) + c] = counts[c];
  }
}

}  // namespace lomix::cuda
