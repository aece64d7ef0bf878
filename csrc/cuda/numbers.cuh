// Numbers as the kernels hold them: a few at a time, exponentials and logarithms, and what the lanes of a warp sum.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../mix_math.h"

namespace lomix::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// N neighbours in memory, moved by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(to) = values;
}

// Logits in any type, as T; gradients back.
template <typename T>
__device__ __forceinline__ T read(float value) {
  return static_cast<T>(value);
}
template <typename T>
__device__ __forceinline__ T read(double value) {
  return static_cast<T>(value);
}
template <typename T>
__device__ __forceinline__ T read(__half value) {
  return static_cast<T>(__half2float(value));
}
template <typename T>
__device__ __forceinline__ T read(__nv_bfloat16 value) {
  return static_cast<T>(__bfloat162float(value));
}
template <typename T>
__device__ __forceinline__ void write(float* to, T value) {
  *to = static_cast<float>(value);
}
template <typename T>
__device__ __forceinline__ void write(double* to, T value) {
  *to = static_cast<double>(value);
}
template <typename T>
__device__ __forceinline__ void write(__half* to, T value) {
  *to = __float2half_rn(static_cast<float>(value));
}
template <typename T>
__device__ __forceinline__ void write(__nv_bfloat16* to, T value) {
  *to = __float2bfloat16_rn(static_cast<float>(value));
}

// exp2f is one instruction where results below 2^-126 may be 0, which the build allows (-ftz=true).
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
// Not __log2f: its error is absolute, and the loss of a pixel that is right is the logarithm of almost 1.
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// log(1 + x), accurate where x is small.
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

template <typename T>
__device__ __forceinline__ T lowest() {
  return -static_cast<T>(INFINITY);
}

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / kLanes; }

// The sum over all lanes, in every lane.
template <typename T>
__device__ __forceinline__ T lane_sum(T value) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

// Sums of N <= 32 numbers over all lanes at once: lane n returns the sum of number n. In each step lanes exchange the
// half of the numbers that the other is to keep: 31 exchanges instead of 5 N.
template <int kApart, int N, typename T>
__device__ __forceinline__ T lane_sums(T (&values)[N], int lane) {
  static_assert(N >= 1 && N <= kLanes);
  const bool upper = (lane & kApart) != 0;
#pragma unroll
  for (int n = 0; n < (N < kApart ? N : kApart); ++n) {
    T high = T(0);
    if (n + kApart < N) high = values[n + kApart < N ? n + kApart : n];
    const T mine = upper ? high : values[n], others = upper ? values[n] : high;
    values[n] = mine + __shfl_xor_sync(kAllLanes, others, kApart);
  }
  if constexpr (kApart > 1) {
    return lane_sums<kApart / 2>(values, lane);
  } else {
    return values[0];
  }
}

}  // namespace lomix::cuda
