// The compiled half of lomix_fast: ops in the namespace lomix_fast_cpp, and the Python module lomix_fast._C.
//
// The ops users see live in lomix_fast/ops.py; these are their CPU implementation and are called from
// lomix_fast/cpu.py. Their CUDA implementation is in cuda/register.cpp, where the module is built with it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/map_stats.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> forward_cpu(at::TensorList logits, const at::Tensor& target,
                                               const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                               const OptionalTensor& awf_weight, const OptionalTensor& awf_bias,
                                               at::IntArrayRef maps, bool squared) {
  return lomix::cpu::map_stats_forward({logits, target, cat_weight, cat_bias, awf_weight, awf_bias, maps, squared});
}

std::vector<at::Tensor> backward_cpu(const at::Tensor& grad_stats, at::TensorList logits, const at::Tensor& target,
                                     const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                     const OptionalTensor& awf_weight, const OptionalTensor& awf_bias,
                                     at::IntArrayRef maps, bool squared) {
  return lomix::cpu::map_stats_backward(grad_stats,
                                        {logits, target, cat_weight, cat_bias, awf_weight, awf_bias, maps, squared});
}

#ifndef LOMIX_CUDA_ARCHITECTURES  // the build defines it when it adds csrc/cuda
#define LOMIX_CUDA_ARCHITECTURES ""
#endif

std::vector<std::string> cuda_architectures() {
  std::istringstream words(LOMIX_CUDA_ARCHITECTURES);
  std::vector<std::string> found;
  for (std::string word; words >> word;) found.push_back(word);
  return found;
}

}  // namespace

TORCH_LIBRARY(lomix_fast_cpp, m) {
  m.def(
      "map_stats_forward(Tensor[] logits, Tensor target, Tensor? cat_weight, Tensor? cat_bias, Tensor? awf_weight, "
      "Tensor? awf_bias, int[] maps, bool squared) -> (Tensor, Tensor)");
  m.def(
      "map_stats_backward(Tensor grad_stats, Tensor[] logits, Tensor target, Tensor? cat_weight, Tensor? cat_bias, "
      "Tensor? awf_weight, Tensor? awf_bias, int[] maps, bool squared) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(lomix_fast_cpp, CPU, m) {
  m.impl("map_stats_forward", &forward_cpu);
  m.impl("map_stats_backward", &backward_cpu);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of lomix_fast; importing it registers torch.ops.lomix_fast_cpp.";
  m.def("cpu_capability", &lomix::cpu::capability, "Instruction set the CPU kernels use: AVX512, AVX2 or DEFAULT.");
  m.def("cuda_architectures", &cuda_architectures,
        "GPU architectures the CUDA kernels are built for, such as 8.0 or 9.0+PTX; empty without CUDA kernels.");
}
