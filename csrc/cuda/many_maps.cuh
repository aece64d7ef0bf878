// The mixes and the softmax of any number of classes, a few classes at a time: a lane takes one pixel, and what does
// not fit registers lies in the block's scratch in global memory. For more classes than few_maps.cuh holds, and for
// double.
#pragma once

#include <cfloat>

#include "few_extra.cuh"
#include "shapes.h"
#include "target.cuh"

namespace lomix::cuda {

// Below every finite logit; not infinite, so that classes of minus infinity may come before others.
template <typename T>
__device__ __forceinline__ T floor_of() {
  return sizeof(T) == sizeof(double) ? static_cast<T>(-DBL_MAX) : static_cast<T>(-FLT_MAX);
}

// One pixel of a lane. Rows are 32 pixels long.
template <typename T>
struct ManyLane {
  const Call<T>* call;
  const T* rows;     // logits [L][C][32], at the lane's pixel
  T* map;            // [C][32], likewise
  T* attention;      // [kMaxScales][32]
  const T* weights;  // of a general call [target_rows][32], likewise
  int label;

  __device__ __forceinline__ T logit(int scale, int c) const { return rows[(scale * call->num_classes + c) * kLanes]; }
  __device__ __forceinline__ T target(int c) const {
    return call->target.dense ? weights[(2 + c) * kLanes] : label == c ? T(1) : T(0);
  }
  __device__ __forceinline__ T dice() const { return call->general ? weights[0] : T(1); }
  __device__ __forceinline__ T ce() const { return call->general ? weights[kLanes] : T(1); }
  __device__ __forceinline__ T share(int c, T y) const { return share_of(call->target, call->target.ce_weight[c], y); }
};

// Label of pixel p of a tile; in general calls its rows too.
template <typename T>
__device__ __forceinline__ int many_label(const Call<T>& call, const Tile& tile, int p, T* rows) {
  return call.general ? store_target<kLanes>(call, tile, p, rows) : tile_label(call, tile, p);
}

// Attention of each member, to lane.attention.
template <typename T>
__device__ void attend(const ManyLane<T>& lane, unsigned members, int first_pair) {
  const Call<T>& call = *lane.call;
  T top = lowest<T>(), total = T(0);
  for_members(members, [&](int j, int scale) {
    const T* const u = call.score + (first_pair + j) * call.padded;
    T s = call.score_bias[first_pair + j];
    for (int c = 0; c < call.num_classes; ++c) s = fused(u[c], lane.logit(scale, c), s);
    s *= static_cast<T>(kLog2E);
    lane.attention[j * kLanes] = s;
    top = larger(top, s);
  });
  const int count = __popc(members);
  for (int j = 0; j < count; ++j) {
    const T e = exp2_of(lane.attention[j * kLanes] - top);
    lane.attention[j * kLanes] = e;
    total += e;
  }
  for (int j = 0; j < count; ++j) lane.attention[j * kLanes] = quotient(lane.attention[j * kLanes], total);
}

// Classes c0 .. c0 + kChunk - 1 of a map; those past C are not used. awf wants `attend` first.
template <typename T>
__device__ void make_chunk(T (&x)[kChunk], const ManyLane<T>& lane, Mix mix, unsigned members, int index,
                           int first_pair, int c0) {
  const Call<T>& call = *lane.call;
  const int classes = call.num_classes;
  if (mix == Mix::kCat) {
    load_uniform(x, call.bias + index * call.padded + c0);
    for_members(members, [&](int j, int scale) {
      for (int c = 0; c < classes; ++c) {
        T w[kChunk];
        load_uniform(w, call.weight + (static_cast<int64_t>(first_pair + j) * classes + c) * call.padded + c0);
        const T value = lane.logit(scale, c);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) x[k] = fused(w[k], value, x[k]);
      }
    });
    return;
  }
#pragma unroll
  for (int k = 0; k < kChunk; ++k) x[k] = mix == Mix::kMul ? T(1) : T(0);
  const Factors<T> factors = factors_of<T>(mix, members);
  for_members(members, [&](int j, int scale) {
    const T factor = mix == Mix::kAwf ? lane.attention[j * kLanes] : j == 0 ? factors.first : factors.other;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (c0 + k >= classes) continue;
      const T value = lane.logit(scale, c0 + k);
      if (mix == Mix::kMul) {
        x[k] *= call.target.bounded ? bounded_of(value).value : value;
      } else if (mix == Mix::kMax) {
        x[k] = is_above(value, x[k], j == 0) ? value : x[k];
      } else {
        x[k] = fused(factor, value, x[k]);
      }
    }
  });
}

// What a softmax needs of the whole map.
template <typename T>
struct Softmax {
  T top;
  T sum;
};

// Make a map: its logits to lane.map, and their largest and the sum of exponentials, in one sweep over the classes.
template <typename T>
__device__ Softmax<T> make_whole(const ManyLane<T>& lane, Mix mix, unsigned members, int index, int first_pair) {
  constexpr T kScale = static_cast<T>(kLog2E);
  const int classes = lane.call->num_classes;
  if (mix == Mix::kAwf) attend(lane, members, first_pair);
  Softmax<T> all{floor_of<T>(), T(0)};
  for (int c0 = 0; c0 < classes; c0 += kChunk) {
    T x[kChunk], top = lowest<T>();
    make_chunk(x, lane, mix, members, index, first_pair, c0);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (c0 + k >= classes) continue;
      lane.map[(c0 + k) * kLanes] = x[k];
      top = larger(top, x[k]);
    }
    top = larger(all.top, top);
    all.sum *= exp2_of((all.top - top) * kScale);
    all.top = top;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (c0 + k < classes) all.sum += exp2_of((x[k] - top) * kScale);
    }
  }
  return all;
}

template <typename T>
__device__ __forceinline__ T exponent(const ManyLane<T>& lane, const Softmax<T>& all, int c) {
  return (lane.map[c * kLanes] - all.top) * static_cast<T>(kLog2E);
}

// Probability of a class, and under sigmoid its slope.
template <typename T>
__device__ __forceinline__ Sigmoid<T> probability(const ManyLane<T>& lane, const Softmax<T>& all, T inverse, int c) {
  if (lane.call->target.sigmoid) return sigmoid_of(lane.map[c * kLanes]);
  return {exp2_of(exponent(lane, all, c)) * inverse, T(0), T(0)};
}

}  // namespace lomix::cuda
