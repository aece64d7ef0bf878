// Single numbers of the mixes that only general calls have: the factor of a bounded product, and which of two is
// larger.
#pragma once

#include "../plan.h"
#include "numbers.cuh"

namespace lomix::cuda {

// f(P) = P / sqrt(1 + (P / kMulBound)^2), and its derivative (1 + (P / kMulBound)^2)^(-3/2).
template <typename T>
struct Bounded {
  T value, slope;
};

template <typename T>
__device__ __forceinline__ Bounded<T> bounded_of(T logit) {
  constexpr T kBound = static_cast<T>(kMulBound), kFar = static_cast<T>(1e15);
  T x = logit / kBound;
  // Far out f no longer changes, and squares would overflow. 0 * x: infinity is no number here, as in plain PyTorch.
  if (fabs(x) > kFar) x = fused(T(0), x, x > T(0) ? kFar : -kFar);
  const T inverse = inverse_root(fused(x, x, T(1)));
  return {kBound * x * inverse, inverse * inverse * inverse};
}

// Whether a candidate takes the place of the largest so far. The first NaN is above everything.
template <typename T>
__device__ __forceinline__ bool is_above(T value, T largest, bool is_first) {
  return is_first || value > largest || (value != value && largest == largest);
}

}  // namespace lomix::cuda
