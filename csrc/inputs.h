// The arguments of the two ops as torch hands them over, their checks, and their types and sizes as kernels want them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "plan.h"
#include "types.h"

namespace lomix {

struct Inputs {
  at::TensorList logits;                        // L x [B, C, *native]
  const at::Tensor& target;                     // [B, *full], integer or bool
  const std::optional<at::Tensor>& cat_weight;  // [K, C, C]
  const std::optional<at::Tensor>& cat_bias;    // [S, C]
  const std::optional<at::Tensor>& awf_weight;  // [K, C]
  const std::optional<at::Tensor>& awf_bias;    // [K]
  at::IntArrayRef maps;                         // MixPlan.encoded, four integers a map
  bool squared;
};

// Raises ValueError (in Python) unless the kernels can rely on the inputs. lomix_fast/checks.py says it in better words
// to those who come through map_stats.
void check_inputs(const Inputs& inputs);

LogitType logit_type(at::ScalarType type);
LabelType label_type(at::ScalarType type);

// Sizes or strides of the spatial axes as z, y, x; missing leading axes have `missing`.
std::array<int64_t, 3> as_zyx(at::IntArrayRef values, size_t first, int64_t missing);

}  // namespace lomix
