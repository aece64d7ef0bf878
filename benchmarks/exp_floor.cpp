// Exponentials and nothing else: what a step cannot do without, timed on its own. Compiled when a benchmark first needs
// it (floor.py), with the flags of the capability that the fused kernel uses; called through ctypes.
#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kBuffer = 2048;  // floats: arguments and results take 16 KiB, at home in any L1

// The order of FUNCTIONS in floor.py.
enum Function { kFast, kAccurate, kOwn };

template <int kFunction>
Vec exponential(const Vec& x) {
  if constexpr (kFunction == kFast) {
    return x.exp_u20();
  } else if constexpr (kFunction == kAccurate) {
    return x.exp();
  } else {
    return lomix::cpu::exp2_softmax(x * Vec(1.44269504f));
  }
}

// Returns the sum of one result of each buffer, another one each time.
template <int kFunction>
double run(int64_t count, int threads) {
  const int64_t buffers = (count + kBuffer - 1) / kBuffer;
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    alignas(64) float x[kBuffer], y[kBuffer];
    for (int64_t i = 0; i < kBuffer; ++i) {
      x[i] = -8.f * static_cast<float>(i) / static_cast<float>(kBuffer);  // softmax never asks for positive ones
      y[i] = 0;
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < buffers; ++b) {
      for (int64_t i = 0; i < kBuffer; i += Vec::size()) exponential<kFunction>(Vec::loadu(x + i)).store(y + i);
      asm volatile("" : : "r"(x), "r"(y) : "memory");  // y is read and x might have changed: no pass can be left out
      total += static_cast<double>(y[b % kBuffer]);
    }
  }
  return total;
}

template <int kFunction>
void values(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::size()) {
    const int64_t some = std::min<int64_t>(Vec::size(), count - i);
    exponential<kFunction>(Vec::loadu(x + i, some)).store(y + i, some);
  }
}

}  // namespace

extern "C" {

// Computes `count` exponentials, rounded up to whole buffers, on `threads` threads; see run for what it returns.
__attribute__((visibility("default"))) double exp_floor_run(int64_t count, int threads, int function) {
  switch (function) {
    case kFast: return run<kFast>(count, threads);
    case kAccurate: return run<kAccurate>(count, threads);
    default: return run<kOwn>(count, threads);
  }
}

// y[i] = exp(x[i]) by the same function, to see that it is one.
__attribute__((visibility("default"))) void exp_floor_values(const float* x, float* y, int64_t count, int function) {
  switch (function) {
    case kFast: return values<kFast>(x, y, count);
    case kAccurate: return values<kAccurate>(x, y, count);
    default: return values<kOwn>(x, y, count);
  }
}
}
