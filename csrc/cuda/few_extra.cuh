// Mixes that only general calls have, of up to 16 classes in registers: differences, means, maxima, bounded products.
#pragma once

#include "bounded.cuh"
#include "few_maps.cuh"

namespace lomix::cuda {

// What each member of a sum, difference or mean is multiplied by: the first, and every other.
template <typename T>
struct Factors {
  T first, other;
};

template <typename T>
__device__ __forceinline__ Factors<T> factors_of(Mix mix, unsigned members) {
  if (mix == Mix::kAvg) {
    const T share = T(1) / static_cast<T>(__popc(members));
    return {share, share};
  }
  return {T(1), mix == Mix::kSub ? T(-1) : T(1)};
}

template <typename T, int C, int P>
__device__ __forceinline__ void mix_linear(T (&x)[C][P], const Lane<T, C, P>& lane, unsigned members,
                                           const Factors<T>& factors) {
  fill(x, T(0));
  for_members(members, [&](int j, int scale) {
    const T* const from = lane.member(scale);
    const T factor = j == 0 ? factors.first : factors.other;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int p = 0; p < P; ++p) x[c][p] = fused(factor, value.at[p], x[c][p]);
    }
  });
}

template <typename T, int C, int P>
__device__ __forceinline__ void mix_bounded(T (&x)[C][P], const Lane<T, C, P>& lane, unsigned members,
                                            bool is_bounded) {
  for_members(members, [&](int, int scale) {
    const T* const from = lane.member(scale);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int p = 0; p < P; ++p) x[c][p] *= is_bounded ? bounded_of(value.at[p]).value : value.at[p];
    }
  });
}

// Which scale each number of a maximum comes from, four bits a number.
template <int C, int P>
struct Winners {
  unsigned bits[(C * P + 7) / 8] = {};

  __device__ __forceinline__ void set(int c, int p, int scale) {
    const int at = c * P + p, shift = at % 8 * 4;
    bits[at / 8] = (bits[at / 8] & ~(15u << shift)) | static_cast<unsigned>(scale) << shift;
  }
  __device__ __forceinline__ bool is(int c, int p, int scale) const {
    const int at = c * P + p;
    return (bits[at / 8] >> at % 8 * 4 & 15u) == static_cast<unsigned>(scale);
  }
};

// The largest member, class by class, the first of equals; what is no number stays none.
template <typename T, int C, int P>
__device__ __forceinline__ void mix_max(T (&x)[C][P], Winners<C, P>& winners, const Lane<T, C, P>& lane,
                                        unsigned members) {
  for_members(members, [&](int j, int scale) {
    const T* const from = lane.member(scale);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<T, P> value = load<P>(from + c * lane.kStrip);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (!is_above(value.at[p], x[c][p], j == 0)) continue;
        x[c][p] = value.at[p];
        winners.set(c, p, scale);
      }
    }
  });
}

}  // namespace lomix::cuda
