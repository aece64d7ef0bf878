// One call of the CPU backend: torch tensors turned into the plain `Problem` that the kernels read.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "../inputs.h"
#include "problem.h"

namespace lomix::cpu {

// Owns everything `problem` points to. T is the arithmetic type: double for double logits, float for all others.
template <typename T>
class Call {
 public:
  explicit Call(const Inputs& inputs);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Problem<T> problem{};
  at::Tensor held_target;  // that of the inputs, class numbers contiguous
  std::vector<Unit> units;
  int64_t batch = 0;
  int64_t units_per_sample = 0;
  int64_t native_grad_size = 0;  // elements of T that the private gradients of all units take

  // The subsets that have a map, with the places of W and u among the rows of the projections.
  const std::vector<Subset>& subsets() const { return subsets_; }

 private:
  void read_target(const Inputs& inputs);
  void read_plan(const Inputs& inputs);
  void make_projections(const Inputs& inputs);
  void choose_block_width();
  void read_scales(const Inputs& inputs);
  void make_axis(int64_t scale, int axis, int64_t native, int64_t full);
  void make_units();
  const T* parameter(const std::optional<at::Tensor>& given, double factor = 1);  // contiguous, times `factor`

  using Index = typename Axis<T>::Index;
  std::vector<Subset> subsets_;
  std::array<std::vector<T>, kMaxScales> projection_, projection_log2_;
  std::vector<at::Tensor> kept_;                                     // contiguous copies, where one was needed
  std::array<std::array<std::vector<Index>, 6>, kMaxScales> index_;  // lo and hi of z, y, x
  std::array<std::array<std::vector<T>, 3>, kMaxScales> frac_;
  std::array<std::array<std::vector<int64_t>, 3>, kMaxScales> at_;
};

}  // namespace lomix::cpu
