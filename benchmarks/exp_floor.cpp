// Exponentials and nothing else: what a step cannot do without, timed on its own. Compiled when a benchmark first needs
// it (floor.py), with the flags of the capability that the fused kernel uses; called through ctypes.
#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kBuffer = 4096;  // floats: 16 KiB, at home in any L1
constexpr int64_t kChains = 4;     // sums kept apart, so that their additions do not wait for each other

template <bool accurate>
Vec exponential(const Vec& x) {
  if constexpr (accurate) {
    return x.exp();
  } else {
    return x.exp_u20();
  }
}

// Sum of exp(x) over kBuffer numbers, so that no exponential can be left out.
template <bool accurate>
float sum_of_exponentials(const float* x) {
  constexpr int64_t step = kChains * Vec::size();
  static_assert(kBuffer % step == 0);
  Vec sums[kChains] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  for (int64_t i = 0; i < kBuffer; i += step) {
    for (int64_t k = 0; k < kChains; ++k) {
      sums[k] = sums[k] + exponential<accurate>(Vec::loadu(x + i + k * Vec::size()));
    }
  }
  const Vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  alignas(64) float parts[Vec::size()];
  all.store(parts);
  float sum = 0;
  for (const float part : parts) {
    sum += part;
  }
  return sum;
}

template <bool accurate>
double run(int64_t count, int threads) {
  const int64_t buffers = (count + kBuffer - 1) / kBuffer;
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    alignas(64) float x[kBuffer];
    for (int64_t i = 0; i < kBuffer; ++i) {
      x[i] = -8.f * static_cast<float>(i) / static_cast<float>(kBuffer);  // softmax never asks for positive ones
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < buffers; ++b) {
      asm volatile("" : : "r"(x) : "memory");  // x might have changed: no buffer's sum serves for the next
      total += sum_of_exponentials<accurate>(x);
    }
  }
  return total;
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

// Computes `count` exponentials, rounded up to whole buffers, on `threads` threads; returns their sum.
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
