// How each kernel is launched: threads, pixels of a strip, and the memory it counts on. Plain C++, shared by kernels
// and glue.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call.h"

namespace lomix::cuda {

// Classes and scales that the kernels hold in registers all at once; more, and all of double, go the class-tiled way.
constexpr int kMostFew = 16, kFewScales = 6;
template <typename T>
constexpr bool may_be_few(int64_t classes, int64_t scales) {
  return sizeof(T) == sizeof(float) && classes <= kMostFew && scales <= kFewScales;
}

// Rows of a strip that tell its target in general calls: weights of Dice and of cross-entropy, then a dense target's
// values of each class.
constexpr int64_t target_rows(int64_t classes, bool general, bool dense) {
  return (general ? 2 : 0) + (dense ? classes : 0);
}

// Bytes of shared memory that a block asks for at most, however much a multiprocessor has: larger tiles only make
// barriers rarer, and L1 keeps the rest.
constexpr int64_t kMostShared = 96 * 1024;

// ---- forward, few classes: warps own maps ----
constexpr int kForwardThreads = 256;
// Pixels a lane takes at once: four share the load of a weight. From 10 classes on registers do not suffice for four,
// in general calls not from 6 on.
constexpr int forward_pixels(int64_t classes, bool general) { return classes <= (general ? 5 : 9) ? 4 : 2; }
// Blocks on a multiprocessor that registers leave room for.
constexpr int forward_blocks(int64_t classes) { return classes <= 14 ? 2 : 1; }

// ---- backward, few classes: warps own strips ----
constexpr int kBackwardThreads = 128;
constexpr int kBackwardWarps = kBackwardThreads / 32;
// Pixels a lane owns: two share the load of a weight where registers and shared memory still let enough warps run.
constexpr int backward_pixels(int64_t scales, int64_t classes, bool general) {
  return classes <= 4 || (!general && scales <= 4 && classes >= 10 && classes <= 12) ? 2 : 1;
}
// Blocks on a multiprocessor that registers leave room for.
constexpr int backward_blocks(int64_t scales, int64_t classes, bool general) {
  if (classes <= 9) return scales <= 4 || (scales == 5 && classes <= 8) ? 4 : 3;
  return scales <= 4 && classes >= 13 && classes <= (general ? 14 : 15) ? 3 : 2;
}
// Whether a product with W^T is unrolled completely: with 7, 8, or more than 9 classes registers do not suffice.
constexpr bool is_unrolled(int64_t classes) { return classes <= 6 || classes == 9; }
// Rows of a strip's scratch: dLoss/dmap of cat, and before that what awf keeps of each member; after them the gradient
// of each member's score.
constexpr int backward_kept(int64_t classes) { return static_cast<int>(std::max<int64_t>(classes, kFewScales)); }

// Numbers of a warp's products with the members of one subset. Before them the rows of a product with W^T lie there.
constexpr int64_t backward_sums(int64_t scales, int64_t classes, int64_t strip) {
  const int64_t products = scales * (classes + 1) * (classes + 1), rows = is_unrolled(classes) ? 0 : classes * strip;
  return (products > rows ? products + 3 : rows + 3) / 4 * 4;  // packs of four are aligned
}

// ---- any number of classes ----
constexpr int kManyThreads = 128;
constexpr int kManyWarps = kManyThreads / 32;
constexpr int kManyBlocks = 4;
constexpr int kChunk = 8;  // classes at a time
// Rows of a strip besides those of the classes: attention or its gradient, and what awf keeps of each member.
constexpr int kManyKept = 2 * kMaxScales;

// The same as constants of the kernels.
template <int C, bool kGeneral>
constexpr int kForwardPixels = forward_pixels(C, kGeneral);
template <int C>
constexpr int kForwardBlocks = forward_blocks(C);
template <int L, int C, bool kGeneral>
constexpr int kBackwardPixels = backward_pixels(L, C, kGeneral);
template <int L, int C, bool kGeneral>
constexpr int kBackwardBlocks = backward_blocks(L, C, kGeneral);
template <int C>
constexpr int kKept = backward_kept(C);
template <int C>
constexpr bool kUnrolled = is_unrolled(C);

// One pass over one kind of problem.
struct Shape {
  int threads;
  int strip;         // pixels of one
  int least_strips;  // of a tile; both are powers of two
  int most_strips;
  int blocks;                 // on a multiprocessor
  int64_t shared_fixed;       // bytes, without the axis tables
  int64_t shared_per_strip;   // bytes
  int64_t scratch_fixed;      // numbers of global scratch a block
  int64_t scratch_per_strip;  // likewise
  int64_t room;               // backward: numbers of shared memory for what lies between the axes of the adjoint
  int64_t warp_sums;          // backward: numbers of shared memory for the products of one warp
};

// What decides the shape of a pass besides the type of its numbers.
struct Problem {
  int64_t classes, scales;
  bool learned;         // some map has parameters
  bool general, dense;  // see Call and Target
  bool few = true;      // by the kernels for few classes
};

template <typename T>
Shape forward_shape(const Problem& problem) {
  const int64_t number = sizeof(T), word = sizeof(int), classes = problem.classes, scales = problem.scales;
  const int64_t counts = (classes + 6) * word;  // and what else a block keeps
  const int64_t rows = target_rows(classes, problem.general, problem.dense);
  if (problem.few) {
    const int64_t strip = 32 * forward_pixels(classes, problem.general);
    return {kForwardThreads,
            static_cast<int>(strip),
            1,
            16,
            forward_blocks(classes),
            counts,
            strip * ((scales * classes + rows) * number + word),
            0,
            0,
            0,
            0};
  }
  return {kManyThreads,
          32,
          1,
          4,
          kManyBlocks,
          counts,
          32 * word,
          kManyWarps * (classes + kMaxScales) * 32,
          (scales * classes + rows) * 32,
          0,
          0};
}

template <typename T>
Shape backward_shape(const Problem& problem) {
  const int64_t number = sizeof(T), word = sizeof(int), classes = problem.classes, scales = problem.scales;
  const int64_t rows = target_rows(classes, problem.general, problem.dense);
  if (problem.few) {
    const int64_t strip = 32 * backward_pixels(scales, classes, problem.general);
    const int64_t rest = (backward_kept(classes) + kFewScales + rows) * strip;
    const int64_t sums = problem.learned ? backward_sums(scales, classes, strip) : 0;
    return {kBackwardThreads,
            static_cast<int>(strip),
            kBackwardWarps,
            kBackwardWarps,
            backward_blocks(scales, classes, problem.general),
            kBackwardWarps * sums * number + 8 * word,
            (scales * classes * strip + rest) * number,
            0,
            0,
            kBackwardWarps * rest,
            sums};
  }
  return {kManyThreads,
          32,
          kManyWarps,
          kManyWarps,
          kManyBlocks,
          0,
          0,
          0,
          (2 * scales * classes + classes + kManyKept + rows) * 32,
          0,
          0};
}

// Bytes of shared memory of a tile with `length` pixels along its axes together.
template <typename T>
int64_t shared_bytes(const Shape& shape, int64_t strips, int64_t length, int64_t scales) {
  const int64_t axes = length * scales * static_cast<int64_t>(sizeof(T) + sizeof(int));
  return shape.shared_fixed + strips * shape.shared_per_strip + axes;
}

}  // namespace lomix::cuda
