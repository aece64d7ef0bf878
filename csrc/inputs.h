// The arguments of the two ops as torch hands them over, their checks, and their types and sizes as kernels want them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "plan.h"
#include "types.h"

namespace lomix {

// Class numbers are kept in floats; MOST_CLASSES in lomix_fast/checks.py.
constexpr int64_t kMostClasses = int64_t{1} << 24;
// Axes of logits and target are shorter.
constexpr int64_t kMostPixels = int64_t{1} << 29;

// What is summed over the pixels, apart from the maps: see map_stats in lomix_fast/ops.py.
struct Rule {
  bool squared;      // Q_c sums s^2 rather than s
  bool bounded;      // products are of bounded factors
  bool sigmoid;      // every class for itself, rather than a softmax over them
  bool weighted_ce;  // the weights of pixels weigh cross-entropy as well as Dice
  std::optional<int64_t> ignore_index;
  double label_smoothing;
};

struct Inputs {
  at::TensorList logits;                        // L x [B, C, *native]
  const at::Tensor& target;                     // class numbers [B, *full], or one value a class [B, C, *full]
  const std::optional<at::Tensor>& weight_map;  // [B, *full], float or bool
  const std::optional<at::Tensor>& ce_weight;   // [C]
  const std::optional<at::Tensor>& cat_weight;  // [K, C, C]
  const std::optional<at::Tensor>& cat_bias;    // [S, C]
  const std::optional<at::Tensor>& awf_weight;  // [K, C]
  const std::optional<at::Tensor>& awf_bias;    // [K]
  at::IntArrayRef maps;                         // MixPlan.encoded, four integers a map
  Rule rule;

  bool is_dense() const { return target.dim() == logits[0].dim(); }
  // Class numbers of pixels that all count alike, under softmax: what kernels are tuned for.
  bool is_plain() const {
    return !is_dense() && !rule.sigmoid && !weight_map && !ce_weight && !rule.ignore_index && rule.label_smoothing == 0;
  }
};

// How many pairs K and subsets S the parameters have rows for; 0 where no map has parameters.
int64_t num_pairs(const Inputs& inputs);
int64_t num_subsets(const Inputs& inputs);

// Raises ValueError (in Python) unless the kernels can rely on the inputs. lomix_fast/checks.py says it in better words
// to those who come through map_stats.
void check_inputs(const Inputs& inputs);

LogitType logit_type(at::ScalarType type);
LabelType label_type(at::ScalarType type);   // of class numbers
LabelType number_type(at::ScalarType type);  // of dense targets and weights

// Sizes or strides of the spatial axes as z, y, x; missing leading axes have `missing`.
std::array<int64_t, 3> as_zyx(at::IntArrayRef values, size_t first, int64_t missing);

}  // namespace lomix
