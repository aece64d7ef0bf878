// bfloat16 as storage: conversions only, so arithmetic on it by accident does not compile.
#pragma once

#include <bit>
#include <cmath>

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<unsigned>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7FFF};  // rounding could carry a NaN's low bits into infinity; this is CUDA's NaN
  const unsigned bits = std::bit_cast<unsigned>(value);
  const unsigned to_nearest_even = 0x7FFFU + ((bits >> 16) & 1U);
  return {static_cast<unsigned short>((bits + to_nearest_even) >> 16)};
}
