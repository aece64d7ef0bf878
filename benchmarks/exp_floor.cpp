// Exponentials and nothing else: what a step cannot do without, timed on its own. Compiled when a benchmark first needs
// it (floor.py), with the flags of the capability that the fused kernel uses; called through ctypes.
#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kBuffer = 2048;  // floats: arguments and results take 16 KiB, at home in any L1
template <bool accurate>
Vec exponential(const Vec& x) {
  if constexpr (accurate) {
    return x.exp();
  } else {
    return x.exp_u20();
  }
}

template <bool accurate>
double run(int64_t count, int threads) {
  const int64_t buffers = (count + kBuffer - 1) / kBuffer;
  double last = 0;
#pragma omp parallel num_threads(threads) reduction(max : last)
  {
    alignas(64) float x[kBuffer], y[kBuffer];
    for (int64_t i = 0; i < kBuffer; ++i) {
      x[i] = -8.f * static_cast<float>(i) / static_cast<float>(kBuffer);  // softmax never asks for positive ones
      y[i] = 0;
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < buffers; ++b) {
      for (int64_t i = 0; i < kBuffer; i += Vec::size()) exponential<accurate>(Vec::loadu(x + i)).store(y + i);
      asm volatile("" : : "r"(x), "r"(y) : "memory");  // y is read and x might have changed: no pass can be left out
    }
    last = static_cast<double>(y[0]);
  }
  return last;
}

template <bool accurate>
void values(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::size()) {
    const int64_t some = std::min<int64_t>(Vec::size(), count - i);
    exponential<accurate>(Vec::loadu(x + i, some)).store(y + i, some);
  }
}

}  // namespace

extern "C" {

// Computes `count` exponentials, rounded up to whole buffers, on `threads` threads; returns one of them.
__attribute__((visibility("default"))) double exp_floor_run(int64_t count, int threads, int accurate) {
  return accurate != 0 ? run<true>(count, threads) : run<false>(count, threads);
}

// y[i] = exp(x[i]) by the same function, to see that it is one.
__attribute__((visibility("default"))) void exp_floor_values(const float* x, float* y, int64_t count, int accurate) {
  if (accurate != 0) {
    values<true>(x, y, count);
  } else {
    values<false>(x, y, count);
  }
}
}
