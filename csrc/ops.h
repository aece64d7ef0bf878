// The two ops as torch calls them, for every library that registers them: schemas, and functions that turn the long
// list of arguments into `Inputs`.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "inputs.h"

#define LOMIX_OP_ARGUMENTS                                                                                         \
  "Tensor[] logits, Tensor target, Tensor? weight_map, Tensor? ce_weight, Tensor? cat_weight, Tensor? cat_bias, "  \
  "Tensor? awf_weight, Tensor? awf_bias, int[] maps, bool squared, bool bounded, bool sigmoid, bool weighted_ce, " \
  "int? ignore_index, float label_smoothing"

namespace lomix {

constexpr const char* kForwardSchema = "map_stats_forward(" LOMIX_OP_ARGUMENTS ") -> (Tensor, Tensor)";
constexpr const char* kBackwardSchema = "map_stats_backward(Tensor grad_stats, " LOMIX_OP_ARGUMENTS ") -> Tensor[]";

using OptionalTensor = std::optional<at::Tensor>;

template <std::tuple<at::Tensor, at::Tensor> (*kRun)(const Inputs&)>
std::tuple<at::Tensor, at::Tensor> forward_op(at::TensorList logits, const at::Tensor& target,
                                              const OptionalTensor& weight_map, const OptionalTensor& ce_weight,
                                              const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                              const OptionalTensor& awf_weight, const OptionalTensor& awf_bias,
                                              at::IntArrayRef maps, bool squared, bool bounded, bool sigmoid,
                                              bool weighted_ce, std::optional<int64_t> ignore_index,
                                              double label_smoothing) {
  return kRun({logits,
               target,
               weight_map,
               ce_weight,
               cat_weight,
               cat_bias,
               awf_weight,
               awf_bias,
               maps,
               {squared, bounded, sigmoid, weighted_ce, ignore_index, label_smoothing}});
}

template <std::vector<at::Tensor> (*kRun)(const at::Tensor&, const Inputs&)>
std::vector<at::Tensor> backward_op(const at::Tensor& grad_stats, at::TensorList logits, const at::Tensor& target,
                                    const OptionalTensor& weight_map, const OptionalTensor& ce_weight,
                                    const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                    const OptionalTensor& awf_weight, const OptionalTensor& awf_bias,
                                    at::IntArrayRef maps, bool squared, bool bounded, bool sigmoid, bool weighted_ce,
                                    std::optional<int64_t> ignore_index, double label_smoothing) {
  return kRun(grad_stats, {logits,
                           target,
                           weight_map,
                           ce_weight,
                           cat_weight,
                           cat_bias,
                           awf_weight,
                           awf_bias,
                           maps,
                           {squared, bounded, sigmoid, weighted_ce, ignore_index, label_smoothing}});
}

}  // namespace lomix
