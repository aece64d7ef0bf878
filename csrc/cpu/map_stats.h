// The two entry points of the CPU backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "call.h"

namespace lomix::cpu {

// (stats [B, M, 1 + 2C], target_stats [B, 1 + C]), float or double as the arithmetic type. Raises ValueError in Python
// for a label outside [0, C), before any other work.
std::tuple<at::Tensor, at::Tensor> map_stats_forward(const Inputs& inputs);

// Gradients of the L logits, in their dtype and layout, then of W, b, u, v (empty where there is none).
std::vector<at::Tensor> map_stats_backward(const at::Tensor& grad_stats, const Inputs& inputs);

}  // namespace lomix::cpu
