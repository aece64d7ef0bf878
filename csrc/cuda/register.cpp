// The ops of ../register.cpp for CUDA tensors. Called from lomix_fast/cuda_backend.py.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "map_stats.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Dispatch brings only CUDA tensors here; who calls past it must not have a CPU address handed to a GPU.
void expect_cuda(at::TensorList logits) {
  for (const at::Tensor& z : logits) {
    TORCH_CHECK_VALUE(z.is_cuda(), "logits: got a tensor on ", z.device(),
                      ", expected CUDA tensors; move them with .cuda()");
  }
}

std::tuple<at::Tensor, at::Tensor> forward_cuda(at::TensorList logits, const at::Tensor& target,
                                                const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                                const OptionalTensor& awf_weight, const OptionalTensor& awf_bias,
                                                at::IntArrayRef maps, bool squared) {
  expect_cuda(logits);
  return lomix::cuda::map_stats_forward({logits, target, cat_weight, cat_bias, awf_weight, awf_bias, maps, squared});
}

std::vector<at::Tensor> backward_cuda(const at::Tensor& grad_stats, at::TensorList logits, const at::Tensor& target,
                                      const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                      const OptionalTensor& awf_weight, const OptionalTensor& awf_bias,
                                      at::IntArrayRef maps, bool squared) {
  expect_cuda(logits);
  return lomix::cuda::map_stats_backward(grad_stats,
                                         {logits, target, cat_weight, cat_bias, awf_weight, awf_bias, maps, squared});
}

}  // namespace

TORCH_LIBRARY_IMPL(lomix_fast_cpp, CUDA, m) {
  m.impl("map_stats_forward", &forward_cuda);
  m.impl("map_stats_backward", &backward_cuda);
}
