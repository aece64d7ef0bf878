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
#include "ops.h"

namespace {

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
  m.def(lomix::kForwardSchema);
  m.def(lomix::kBackwardSchema);
}

TORCH_LIBRARY_IMPL(lomix_fast_cpp, CPU, m) {
  m.impl("map_stats_forward", &lomix::forward_op<lomix::cpu::map_stats_forward>);
  m.impl("map_stats_backward", &lomix::backward_op<lomix::cpu::map_stats_backward>);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of lomix_fast; importing it registers torch.ops.lomix_fast_cpp.";
  m.def("cpu_capability", &lomix::cpu::capability, "Instruction set the CPU kernels use: AVX512, AVX2 or DEFAULT.");
  m.def("cuda_architectures", &cuda_architectures,
        "GPU architectures the CUDA kernels are built for, such as 8.0 or 9.0+PTX; empty without CUDA kernels.");
}
