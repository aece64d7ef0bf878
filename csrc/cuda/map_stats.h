// The two entry points of the CUDA backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../inputs.h"

namespace lomix::cuda {

// (stats [B, M, 1 + 2C], target_stats [B, 1 + C]), float or double as the arithmetic type. A sample with a label
// outside [0, C) has NaN in all its statistics: raising would need a sync.
std::tuple<at::Tensor, at::Tensor> map_stats_forward(const Inputs& inputs);

// Gradients of the L logits, in their dtype and layout, then of W, b, u, v (empty where there is none); NaN for a
// sample with a label outside [0, C).
std::vector<at::Tensor> map_stats_backward(const at::Tensor& grad_stats, const Inputs& inputs);

}  // namespace lomix::cuda
