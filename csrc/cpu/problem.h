// What the torch glue hands to the kernels: plain data, no torch types, so kernels compile apart for each CPU
// capability.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../plan.h"

namespace lomix::cpu {

enum class LogitType : int { kFloat, kDouble, kHalf, kBFloat16 };
enum class LabelType : int { kUInt8, kInt8, kInt16, kInt32, kInt64 };

// Linear interpolation along one axis: out[i] = (1 - frac[i]) * in[lo[i]] + frac[i] * in[hi[i]].
// Index has the width of T because SIMD gathers want it so.
template <typename T>
struct Axis {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Index* lo;  // [out]
  const Index* hi;  // [out], lo or lo + 1
  const T* frac;    // [out], in [0, 1]
};

// Native logits of one scale, [B, C, d, h, w] with any strides, and where its gradient goes.
template <typename T>
struct Scale {
  const void* logits;
  void* grad;              // null in the forward pass
  int64_t stride[5];       // of logits, in elements, for b, c, z, y, x
  int64_t grad_stride[5];  // of grad
  int64_t size[3];         // native d, h, w
  bool used;               // whether any map of the plan reads it
  bool identity;           // native size == full size
  Axis<T> axis[3];         // z, y, x
};

// A block of output rows of one sample: the unit of work. Its borders do not depend on the number of threads, so
// neither do the results.
struct Unit {
  int64_t batch;
  int64_t z_begin, z_end;
  int64_t y_begin, y_end;
  // Native rows of each scale that the unit touches, and where its private gradient of them lies in `native_grads`.
  int64_t native_z[kMaxScales], native_nz[kMaxScales];
  int64_t native_y[kMaxScales], native_ny[kMaxScales];
  int64_t native_offset[kMaxScales];
};

// One call. Gradient members are null in the forward pass.
template <typename T>
struct Problem {
  int64_t num_scales, num_classes, num_maps;
  int64_t num_pairs, num_subsets;
  int64_t depth, height, width;  // full size
  bool squared;                  // Q_c sums s^2 rather than s
  LogitType logit_type;
  LabelType label_type;
  Scale<T> scales[kMaxScales];
  const MapSpec* maps;  // [M]
  const Unit* units;
  const void* labels;   // [B, D, H, W], contiguous, all in [0, C)
  const T* cat_weight;  // W [K, C, C]
  const T* cat_bias;    // b [S, C]
  const T* awf_weight;  // u [K, C]
  const T* awf_bias;    // v [K]
  const T* grad_stats;  // [B, M, 1 + 2C]
  T* native_grads;      // private gradients of all units, each [nz, ny, w, C]
};

// Sums that one unit adds to. Doubles: a unit may hold millions of pixels.
struct StatsOut {
  double* stats;          // [M, 1 + 2C]
  int64_t* label_counts;  // [C]
};
struct ParameterGrads {
  double* cat_weight;  // [K, C, C]
  double* cat_bias;    // [S, C]
  double* awf_weight;  // [K, C]
  double* awf_bias;    // [K]
};

// The entry points of one CPU capability, for one dtype. Scratch is private to the caller's thread, 64-byte aligned.
template <typename T>
struct Kernels {
  int64_t (*forward_scratch)(const Problem<T>&);   // bytes
  int64_t (*backward_scratch)(const Problem<T>&);  // bytes
  void (*forward)(const Problem<T>&, const Unit&, void* scratch, const StatsOut&);
  void (*backward)(const Problem<T>&, const Unit&, void* scratch, const ParameterGrads&);
};

}  // namespace lomix::cpu
