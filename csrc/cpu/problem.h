// What the torch glue hands to the kernels: plain data, no torch types, so kernels compile apart for each CPU
// capability.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../plan.h"
#include "../types.h"

namespace lomix::cpu {

// Pixels that an axis table is padded with, by its last entry: a whole vector may be read from any pixel.
constexpr int64_t kAxisPadding = 64;

// A tile is up to kTileRows output rows of kTileWidth pixels; small, so that what a map reads lies in L1. Arrays of the
// tile's pixels are kTilePixels long: an odd number of cache lines, so that the same pixel of many classes spreads over
// all sets of that cache.
constexpr int64_t kTileRows = 8;
constexpr int64_t kTileWidth = 32;
constexpr int64_t kTilePixels = kTileRows * kTileWidth + 16;

// Additions of floats into one lane before they are carried over to doubles.
constexpr int64_t kMostAdditions = 1024;

// Linear interpolation along one axis: out[i] = (1 - frac[i]) * in[lo[i]] + frac[i] * in[hi[i]], and just in[lo[i]]
// where frac is 0: what has no weight is not read, be it infinite.
// lo and hi count the native coordinates that are read, `kept` of them, number n of which is at[n]. Where an axis
// shrinks to less than half there are others, and no work is done for those. Index has the width of T because SIMD
// gathers want it so.
template <typename T>
struct Axis {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Index* lo;  // [out + kAxisPadding], never decreasing
  const Index* hi;  // [out + kAxisPadding], lo or lo + 1; lo where frac is 0
  const T* frac;    // [out + kAxisPadding], in [0, 1)
  const int64_t* at;
  int64_t kept;
};

// Native logits of one scale, [B, C, d, h, w] with any strides, and where its gradient goes.
template <typename T>
struct Scale {
  const void* logits;
  void* grad;              // null in the forward pass
  int64_t stride[5];       // of logits, in elements, for b, c, z, y, x
  int64_t grad_stride[5];  // of grad
  int64_t size[3];         // native d, h, w
  bool used;               // whether any map of the plan reads it
  bool identity;           // native size == full size
  Axis<T> axis[3];         // z, y, x
  // The rows of all W_{S,l} and u_{S,l} that the plan needs, one below the other: what cat and awf make of this scale
  // before it is enlarged.
  const T* projection;       // [rows_padded, C], zeros past `rows`
  const T* projection_log2;  // the same times log2(e)
  int64_t rows;
  int64_t rows_padded;  // a multiple of 4
  int64_t slots;        // native rows that the output rows of one tile can touch together
};

// How a pixel is judged. Plain: class numbers that all count alike, under softmax, with the four operators of the
// paper; the others take any target, weights and operators.
enum class Kind { kPlain, kSoftmax, kSigmoid };

// What the maps are held against. Weights and shares are made of it tile by tile (targets.h).
template <typename T>
struct TargetData {
  // Class numbers [B, D, H, W], contiguous, all in [0, C) or ignored; or when dense [B, C, D, H, W] with any strides.
  const void* values;
  LabelType type;
  bool dense;
  int64_t stride[5];   // of dense values, in elements: b, c, z, y, x
  const void* weight;  // [B, D, H, W] or null
  LabelType weight_type;
  int64_t weight_stride[4];
  bool weighted_ce;   // whether `weight` is for cross-entropy too
  bool unit_weights;  // all that cross-entropy is multiplied with is 0 or 1
  bool uniform;       // positives weigh in cross-entropy what negatives do
  bool has_ignore;
  int64_t ignore;
  // Cross-entropy takes t_c = a_c y_c + b_c for class c; null for plain ones.
  const T *a, *b;
  const T* ce_weight;  // [C], what class numbers add to the normalisation
};

// The maps made from one subset of scales. Row numbers are those of `Scale::projection`, -1 where the plan lacks the
// map.
struct Subset {
  int size;
  int members[kMaxScales];  // increasing scale numbers, 0 the coarsest
  int map[kOperators];      // by Operator: row of the statistics, -1 where there is none
  int cat_row[kMaxScales];  // first of C rows
  int awf_row[kMaxScales];
  int index;       // row of b [S, C]
  int first_pair;  // member number i owns entry first_pair + i of v [K]
  int of(Operator op) const { return map[static_cast<int>(op)]; }
};

// A block of output rows of one sample: the unit of work. Its borders do not depend on the number of threads, so
// neither do the results.
struct Unit {
  int64_t batch;
  int64_t z_begin, z_end;
  int64_t y_begin, y_end;
  // Native rows of each scale that the unit touches, as its axes count them, and where its private gradient of them
  // lies in `native_grads`.
  int64_t native_z[kMaxScales], native_nz[kMaxScales];
  int64_t native_y[kMaxScales], native_ny[kMaxScales];
  int64_t native_offset[kMaxScales];
};

// One call. Gradient members are null in the forward pass.
template <typename T>
struct Problem {
  int64_t num_scales, num_classes, num_maps, num_pairs, num_subsets;
  int64_t depth, height, width;  // full size
  int64_t block_width;           // output columns that are swept together, a multiple of kTileWidth
  Kind kind;
  bool squared;  // Q_c sums s^2 rather than s
  bool has_add;
  bool bounded;  // some map is a product of bounded factors
  LogitType logit_type;
  TargetData<T> target;
  Scale<T> scales[kMaxScales];
  int original[kMaxScales];  // row of the statistics of each scale's own map, -1 where the plan lacks it
  const Subset* subsets;     // [num_subsets], only those with a map
  const Unit* units;
  const T* cat_bias;    // b [S, C], times log2(e)
  const T* awf_bias;    // v [K], times log2(e)
  const T* grad_stats;  // [B, M, 1 + 2C]
  T* native_grads;      // private gradients of all units, each [nz, ny, columns that are read, C]
};

// Sums that units add to. Doubles: a unit may hold millions of pixels.
struct StatsOut {
  double* stats;  // of the first unit: [M, 1 + 2C], then [1 + C], see target_stats in lomix_fast/target.py
  int64_t apart;  // from one unit's to the next one's
};
struct ProjectionGrads {
  double* scale[kMaxScales];  // [rows, C + 1]: gradient of `Scale::projection`, then of what is added to its result
};

// The entry points of one CPU capability, for one dtype. A pass makes its scratch ready once for all the units it is
// given one after the other: small samples are many units. Scratch is private to the caller's thread, 64-byte aligned.
template <typename T>
struct Kernels {
  int64_t (*forward_scratch)(const Problem<T>&);   // bytes
  int64_t (*backward_scratch)(const Problem<T>&);  // bytes
  // Units [first, last).
  void (*forward)(const Problem<T>&, int64_t first, int64_t last, void* scratch, const StatsOut&);
  void (*backward)(const Problem<T>&, int64_t first, int64_t last, void* scratch, const ProjectionGrads&);
};

}  // namespace lomix::cpu
