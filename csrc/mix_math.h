// Mathematics that host and device share: where an output pixel looks in a native axis.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOMIX_HD __host__ __device__ __forceinline__
#else
#define LOMIX_HD inline
#endif

namespace lomix {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// What output coordinate `out` of an axis reads: native coordinates `low` and min(low + 1, native - 1), and the weight
// of the latter. (out + 1/2) native / full - 1/2 as a fraction of integers, so that no two kernels disagree about a
// neighbour. The convention of torch.nn.functional.interpolate with align_corners=False.
template <typename T, typename Index>
struct Source {
  Index low;
  T weight;  // in [0, 1); 0 where low is the last
};

template <typename T, typename Index>
LOMIX_HD Source<T, Index> source(Index out, Index full, Index native) {
  Index numerator = (2 * out + 1) * native - full;
  if (numerator < 0) numerator = 0;
  const Index low = numerator / (2 * full);
  if (low >= native - 1) return {native - 1, T(0)};
  return {low, static_cast<T>(numerator - low * (2 * full)) / static_cast<T>(2 * full)};
}

}  // namespace lomix
