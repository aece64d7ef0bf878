// A tile of pixels in L1 and the buffers around it. Included once per CPU capability.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#include "problem.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Number of classes: a constant for the common counts, so that class loops unroll, otherwise a run-time value.
template <int kC>
struct Classes {
  explicit Classes(int64_t) {}
  constexpr operator int() const { return kC; }
};
template <>
struct Classes<0> {
  explicit Classes(int64_t n) : value(static_cast<int>(n)) {}
  operator int() const { return value; }
  int value;
};

// Hands out 64-byte aligned pieces of one block; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// All buffers are [.., capacity], pixels fastest. Pixels past `count` up to a whole vector are padding: their logits
// are zero, their label mask and lane mask are empty, and so everything they would add is exactly zero.
template <typename T>
struct Tile {
  int64_t capacity;     // pixels, a multiple of the vector width
  int64_t count = 0;    // pixels in use
  int64_t vectors = 0;  // vectors in use, ceil(count / width)
  T* scales;            // P [L, C, capacity]
  T* label_mask;        // [C, capacity], all bits set where y == c
  T* lane_mask;         // [capacity], all bits set where the pixel exists
  T* map;               // [C, capacity], one map, then its exponentials, then its gradient
  T* inverse;           // [capacity], 1 / sum of exponentials
  T* attention;         // [L, capacity], awf weights of one subset
  T* grad_scales;       // dP [L, C, capacity], backward only
  T* grad_score;        // [L, capacity], backward only

  Tile(const Problem<T>& problem, bool backward, Arena& arena) {
    const int64_t L = problem.num_scales, C = problem.num_classes;
    const int64_t rows = (backward ? 2 : 1) * L * C + 2 * C + (backward ? 2 : 1) * L + 2;
    capacity = choose_capacity(rows);
    scales = arena.take<T>(L * C * capacity);
    label_mask = arena.take<T>(C * capacity);
    lane_mask = arena.take<T>(capacity);
    map = arena.take<T>(C * capacity);
    inverse = arena.take<T>(capacity);
    attention = arena.take<T>(L * capacity);
    grad_scales = backward ? arena.take<T>(L * C * capacity) : nullptr;
    grad_score = backward ? arena.take<T>(L * capacity) : nullptr;
  }

  // About L1; measured on AVX2: 28 KiB is 4 % slower, for its shorter rows. Blocks of four vectors suit mix.h.
  static int64_t choose_capacity(int64_t rows) {
    constexpr int64_t kBudget = 48 * 1024, kMaxPixels = 256;
    constexpr int64_t kBlock = 4 * Vec<T>::size();
    const int64_t fits = kBudget / (rows * static_cast<int64_t>(sizeof(T)));
    if (fits < kBlock) return kBlock / 2;
    return (fits < kMaxPixels ? fits : kMaxPixels) / kBlock * kBlock;
  }

  T* scale(int64_t l, int64_t c, int64_t C) const { return scales + (l * C + c) * capacity; }
  T* grad_scale(int64_t l, int64_t c, int64_t C) const { return grad_scales + (l * C + c) * capacity; }

  // Set the number of pixels in use and clear what the padding of the last vector would read.
  void resize(int64_t pixels, int64_t num_rows) {
    constexpr int64_t kV = Vec<T>::size();
    count = pixels;
    vectors = (pixels + kV - 1) / kV;
    const T ones = all_ones();
    for (int64_t p = 0; p < vectors * kV; ++p) lane_mask[p] = p < count ? ones : T(0);
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t p = count; p < vectors * kV; ++p) scales[r * capacity + p] = T(0);
    }
  }

  static T all_ones() {
    T value;
    std::memset(&value, 0xff, sizeof(T));
    return value;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
