// The target of general calls: labels or values of each class, and what pixels weigh. And what a class adds to the loss
// under sigmoid.
#pragma once

#include "tile.cuh"

namespace lomix::cuda {

constexpr int kShares = -3;  // a pixel of a dense target has no label, but one value a class

// One of a tensor's numbers, of any LabelType.
template <typename T>
__device__ __forceinline__ T number_at(const void* numbers, int type, int64_t at) {
  switch (static_cast<LabelType>(type)) {
    case LabelType::kUInt8: return static_cast<T>(static_cast<const uint8_t*>(numbers)[at]);
    case LabelType::kInt8: return static_cast<T>(static_cast<const int8_t*>(numbers)[at]);
    case LabelType::kInt16: return static_cast<T>(static_cast<const int16_t*>(numbers)[at]);
    case LabelType::kInt32: return static_cast<T>(static_cast<const int32_t*>(numbers)[at]);
    case LabelType::kInt64: return static_cast<T>(static_cast<const int64_t*>(numbers)[at]);
    case LabelType::kDouble: return static_cast<T>(static_cast<const double*>(numbers)[at]);
    case LabelType::kHalf: return read<T>(static_cast<const __half*>(numbers)[at]);
    case LabelType::kBFloat16: return read<T>(static_cast<const __nv_bfloat16*>(numbers)[at]);
    default: return static_cast<T>(static_cast<const float*>(numbers)[at]);
  }
}

// Whether a float is this number, exactly. Subnormal numbers, which may be 0 to arithmetic (-ftz=true), are not 0.
template <typename Bits, typename Number>
__device__ __forceinline__ bool is_float(const void* numbers, int64_t at, int64_t wanted) {
  if (wanted == 0) return static_cast<Bits>(static_cast<const Bits*>(numbers)[at] << 1) == 0;
  return read<double>(static_cast<const Number*>(numbers)[at]) == static_cast<double>(wanted);
}

// The same of one of a tensor's numbers, of any LabelType, in its own type.
__device__ __forceinline__ bool is_number(const void* numbers, int type, int64_t at, int64_t wanted) {
  switch (static_cast<LabelType>(type)) {
    case LabelType::kFloat: return is_float<uint32_t, float>(numbers, at, wanted);
    case LabelType::kDouble: return is_float<uint64_t, double>(numbers, at, wanted);
    case LabelType::kHalf: return is_float<uint16_t, __half>(numbers, at, wanted);
    case LabelType::kBFloat16: return is_float<uint16_t, __nv_bfloat16>(numbers, at, wanted);
    default: return number_at<int64_t>(numbers, type, at) == wanted;
  }
}

// What a pixel is held against, and with what weight: 0 where it is past the border or left out.
template <typename T>
struct Held {
  int label;       // kShares where the target is dense
  T dice, ce;      // weights
  int64_t values;  // of a dense target: where that of the first class lies
};

// Pixel p of a tile.
template <typename T>
__device__ __forceinline__ Held<T> held_at(const Call<T>& call, const Tile& tile, int p) {
  const Target<T>& target = call.target;
  Held<T> held{kOutside, T(0), T(0), 0};
  const Place at = offset_of(call.tiling, p);
  if (!is_inside(call, tile, at)) return held;
  const int64_t b = tile.sample, z = tile.origin.z + at.z, y = tile.origin.y + at.y, x = tile.origin.x + at.x;
  const auto place = [&](const int64_t (&stride)[4]) {
    return b * stride[0] + z * stride[1] + y * stride[2] + x * stride[3];
  };
  if (target.dense) {
    held.label = kShares;
    held.values = place(call.label_stride);
    const bool is_ignored =
        target.has_ignored && is_number(call.labels, call.label_type, held.values, target.ignore_index);
    if (is_ignored) held.label = kOutside;
  } else {
    held.label = label_at<true>(call, b, static_cast<int>(z), static_cast<int>(y), static_cast<int>(x));
  }
  if (held.label == kOutside) return held;
  held.dice =
      target.weight == nullptr ? T(1) : number_at<T>(target.weight, target.weight_type, place(target.weight_stride));
  held.ce = target.weighted_ce ? held.dice : T(1);
  return held;
}

// Value of a class where the target is dense.
template <typename T>
__device__ __forceinline__ T value_of(const Call<T>& call, const Held<T>& held, int c) {
  if (held.label != kShares) return T(0);
  return number_at<T>(call.labels, call.label_type, held.values + c * call.target.class_stride);
}

// Writes the rows of a pixel, those that shapes.h counts, S numbers apart; returns its label.
template <int S, typename T>
__device__ __forceinline__ int store_target(const Call<T>& call, const Tile& tile, int p, T* rows) {
  const Held<T> held = held_at(call, tile, p);
  rows[0] = held.dice;
  rows[S] = held.ce;
  if (call.target.dense) {
#pragma unroll 1
    for (int c = 0; c < call.num_classes; ++c) rows[(2 + c) * S] = value_of(call, held, c);
  }
  return held.label;
}

// Share of a class with target y in the cross-entropy of a pixel.
template <typename T>
__device__ __forceinline__ T share_of(const Target<T>& target, T ce_weight, T y) {
  return ce_weight * fused(y, target.own_share, target.any_share);
}

// One class under sigmoid: its probability, the slope of that, and exp(-|x|), which log(1 + exp(x)) needs too.
template <typename T>
struct Sigmoid {
  T value, slope, small;
};

template <typename T>
__device__ __forceinline__ Sigmoid<T> sigmoid_of(T x) {
  const T small = exp2_of(-fabs(x) * static_cast<T>(kLog2E)), inverse = quotient(T(1), T(1) + small);
  return {x >= T(0) ? inverse : small * inverse, small * inverse * inverse, small};
}

// -t log s - (1 - y) log(1 - s). None of its terms is below 0: nothing cancels.
template <typename T>
__device__ __forceinline__ T sigmoid_loss(T x, T small, T y, T share) {
  return fused(T(1) - y + share, log1p_of(small), x > T(0) ? (T(1) - y) * x : -share * x);
}

}  // namespace lomix::cuda
