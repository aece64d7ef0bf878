// Device arithmetic and atomics. Intrinsics that round less exactly on a GPU round correctly here.
#pragma once

#include <math.h>  // the header with the names in the global namespace, overloads included

#include <bit>
#include <cmath>
#include <cstdint>

// glibc declares these itself, some not before 2.42, as noexcept, so they have to look the same here.
inline float __expf(float a) noexcept { return ::expf(a); }
inline float __logf(float a) noexcept { return ::logf(a); }
inline float __log2f(float a) noexcept { return ::log2f(a); }

inline float rsqrtf(float a) noexcept { return 1.0F / ::sqrtf(a); }
inline double rsqrt(double a) noexcept { return 1.0 / ::sqrt(a); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0F / a; }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
// CUDA promises that these are never contracted into a fused multiply-add; the barrier keeps a compiler from it.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  __asm__("" : "+m"(product));
  return product;
}
inline float __fadd_rn(float a, float b) {
  float sum = a + b;
  __asm__("" : "+m"(sum));
  return sum;
}

inline int min(int a, int b) { return b < a ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return b < a ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
inline float min(float a, float b) { return ::fminf(a, b); }
inline double min(double a, double b) { return ::fmin(a, b); }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float max(float a, float b) { return ::fmaxf(a, b); }
inline double max(double a, double b) { return ::fmax(a, b); }

inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __popc(unsigned a) { return std::popcount(a); }
inline int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }

template <class T>
inline T __ldg(const T* place) {
  return *place;
}

// Fibers never run at the same time, so plain operations are atomic. There is none on floating point: the order of
// such sums would change from run to run, and this way they do not compile.
namespace cuda_host {
template <class T>
inline T exchange(T* place, T value) {
  const T old = *place;
  *place = value;
  return old;
}
}  // namespace cuda_host

inline int atomicAdd(int* place, int value) {  // wraps around, as a GPU does, without overflow in the eyes of UBSan
  return cuda_host::exchange(place, static_cast<int>(static_cast<unsigned>(*place) + static_cast<unsigned>(value)));
}
inline unsigned atomicAdd(unsigned* place, unsigned value) { return cuda_host::exchange(place, *place + value); }
inline unsigned long long atomicAdd(unsigned long long* place, unsigned long long value) {
  return cuda_host::exchange(place, *place + value);
}
inline int atomicMax(int* place, int value) { return cuda_host::exchange(place, max(*place, value)); }
inline int atomicMin(int* place, int value) { return cuda_host::exchange(place, min(*place, value)); }
inline int atomicOr(int* place, int value) { return cuda_host::exchange(place, *place | value); }
inline unsigned atomicOr(unsigned* place, unsigned value) { return cuda_host::exchange(place, *place | value); }
inline int atomicExch(int* place, int value) { return cuda_host::exchange(place, value); }

inline void __threadfence() {}
inline void __threadfence_block() {}
