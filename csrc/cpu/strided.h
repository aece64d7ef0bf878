// Reading logits and writing gradients of any dtype and strides, one row at a time.
//
// Internal linkage on purpose: these functions are compiled for several CPU capabilities, and a shared inline copy
// could be one that the machine cannot run.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "problem.h"

namespace lomix::cpu {

template <typename From, typename T>
static inline void load_strided(const From* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i * stride]);
  }
}

template <typename To, typename T>
static inline void store_strided(const T* from, int64_t from_stride, int64_t count, To* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) to[i * stride] = static_cast<To>(from[i * from_stride]);
}

// Whether columns [x, x + count) of those that are read are neighbours.
template <typename T>
static inline bool are_neighbours(const Axis<T>& axis, int64_t x, int64_t count) {
  return axis.at[x + count - 1] - axis.at[x] == count - 1;
}

// Read `count` logits of one row starting at x into `to`, in the arithmetic type. Places as the axes count them.
template <typename T>
static inline void load_logits(const Scale<T>& s, LogitType type, int64_t b, int64_t c, int64_t z, int64_t y, int64_t x,
                               int64_t count, T* to) {
  const int64_t step = s.stride[4];
  const int64_t row = b * s.stride[0] + c * s.stride[1] + s.axis[0].at[z] * s.stride[2] + s.axis[1].at[y] * s.stride[3];
  const auto load = [&](const auto* from) {
    if (are_neighbours(s.axis[2], x, count)) return load_strided(from + s.axis[2].at[x] * step, step, count, to);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[s.axis[2].at[x + i] * step]);
  };
  switch (type) {
    case LogitType::kFloat: return load(static_cast<const float*>(s.logits) + row);
    case LogitType::kDouble: return load(static_cast<const double*>(s.logits) + row);
    case LogitType::kHalf: return load(static_cast<const c10::Half*>(s.logits) + row);
    case LogitType::kBFloat16: return load(static_cast<const c10::BFloat16*>(s.logits) + row);
  }
}

// Write `count` gradients of one row starting at x, in the type of the logits, at places as the axes count them;
// columns are neighbours. `from_stride` lets channels lie fastest.
template <typename T>
static inline void store_grads(const Scale<T>& s, LogitType type, int64_t b, int64_t c, int64_t z, int64_t y, int64_t x,
                               int64_t count, const T* from, int64_t from_stride) {
  const int64_t* g = s.grad_stride;
  const int64_t at = b * g[0] + c * g[1] + s.axis[0].at[z] * g[2] + s.axis[1].at[y] * g[3] + s.axis[2].at[x] * g[4];
  switch (type) {
    case LogitType::kFloat: return store_strided(from, from_stride, count, static_cast<float*>(s.grad) + at, g[4]);
    case LogitType::kDouble: return store_strided(from, from_stride, count, static_cast<double*>(s.grad) + at, g[4]);
    case LogitType::kHalf: return store_strided(from, from_stride, count, static_cast<c10::Half*>(s.grad) + at, g[4]);
    case LogitType::kBFloat16:
      return store_strided(from, from_stride, count, static_cast<c10::BFloat16*>(s.grad) + at, g[4]);
  }
}

}  // namespace lomix::cpu
