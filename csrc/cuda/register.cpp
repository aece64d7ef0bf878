// The ops of ../register.cpp for CUDA tensors. Called from lomix_fast/cuda_backend.py.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "../ops.h"
#include "map_stats.h"

namespace {

// Dispatch brings only CUDA tensors here; who calls past it must not have a CPU address handed to a GPU.
void expect_cuda(at::TensorList logits) {
  for (const at::Tensor& z : logits) {
    TORCH_CHECK_VALUE(z.is_cuda(), "logits: got a tensor on ", z.device(),
                      ", expected CUDA tensors; move them with .cuda()");
  }
}

std::tuple<at::Tensor, at::Tensor> forward_cuda(const lomix::Inputs& inputs) {
  expect_cuda(inputs.logits);
  return lomix::cuda::map_stats_forward(inputs);
}

std::vector<at::Tensor> backward_cuda(const at::Tensor& grad_stats, const lomix::Inputs& inputs) {
  expect_cuda(inputs.logits);
  return lomix::cuda::map_stats_backward(grad_stats, inputs);
}

}  // namespace

TORCH_LIBRARY_IMPL(lomix_fast_cpp, CUDA, m) {
  m.impl("map_stats_forward", &lomix::forward_op<forward_cuda>);
  m.impl("map_stats_backward", &lomix::backward_op<backward_cuda>);
}
