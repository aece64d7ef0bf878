// Runs the units of a call in parallel and adds up what they found, always in the same order.
#include "map_stats.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "check_values.h"
#include "dispatch.h"
#include "strided.h"

namespace lomix::cpu {
namespace {

template <typename T>
std::tuple<at::Tensor, at::Tensor> forward(const Inputs& inputs) {
  Call<T> call(inputs);
  const Problem<T>& problem = call.problem;
  check_values(inputs, call.held_target);
  const int64_t C = problem.num_classes, columns = problem.num_maps * (1 + 2 * C);
  const int64_t num_units = static_cast<int64_t>(call.units.size()), apart = columns + 1 + C;
  const auto options = inputs.logits[0].options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor out = at::empty({call.batch, problem.num_maps, 1 + 2 * C}, options);
  at::Tensor target_out = at::empty({call.batch, 1 + C}, options);
  T* to = out.template mutable_data_ptr<T>();
  T* target_to = target_out.template mutable_data_ptr<T>();
  const double pixels = static_cast<double>(problem.depth * problem.height * problem.width);
  // What the units of sample b have found, added up.
  const auto finish = [&](const double* stats, int64_t b) {
    const auto total = [&](int64_t column) {
      double sum = 0;
      for (int64_t i = 0; i < call.units_per_sample; ++i) sum += stats[i * apart + column];
      return sum;
    };
    for (int64_t k = 0; k < columns; ++k) to[b * columns + k] = static_cast<T>(total(k));
    for (int64_t k = 0; k <= C; ++k) {
      const bool is_plain_count = k == 0 && problem.kind == Kind::kPlain;
      target_to[b * (1 + C) + k] = static_cast<T>(is_plain_count ? pixels : total(columns + k));
    }
  };

  // The sums of every unit. Samples of one unit are finished at once, a few at a time, or the sums of very many small
  // ones would take more memory than the result.
  const Kernels<T>& run = kernels<T>();
  const int64_t scratch_size = run.forward_scratch(problem);
  const bool at_once = call.units_per_sample == 1;
  constexpr int64_t kFewDoubles = 1 << 17;
  const int64_t few = std::max<int64_t>(1, kFewDoubles / apart);
  std::vector<double> stats(static_cast<size_t>(at_once ? 0 : num_units * apart), 0.0);
  at::parallel_for(0, num_units, 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(static_cast<size_t>(scratch_size));
    if (!at_once) return run.forward(problem, begin, end, scratch.get(), {stats.data() + begin * apart, apart});
    std::vector<double> own(static_cast<size_t>(std::min(few, end - begin) * apart));
    for (int64_t first = begin; first < end; first += few) {
      const int64_t last = std::min(first + few, end);
      std::fill(own.begin(), own.end(), 0.0);
      run.forward(problem, first, last, scratch.get(), {own.data(), apart});
      for (int64_t b = first; b < last; ++b) finish(own.data() + (b - first) * apart, b);
    }
  });
  for (int64_t b = 0; !at_once && b < call.batch; ++b) finish(stats.data() + b * call.units_per_sample * apart, b);
  return {out, target_out};
}

// Whether some native pixels of a scale are read by no pixel.
template <typename T>
bool has_gaps(const Scale<T>& scale) {
  return scale.axis[0].kept < scale.size[0] || scale.axis[1].kept < scale.size[1] || scale.axis[2].kept < scale.size[2];
}

// Sum of the private gradients of all units for one native row that is read, written to the gradient of that scale.
template <typename T>
void gather_row(const Call<T>& call, int64_t l, int64_t b, int64_t z, int64_t y, T* row) {
  const Problem<T>& problem = call.problem;
  const Scale<T>& scale = problem.scales[l];
  const int64_t columns = scale.axis[2].kept, length = columns * problem.num_classes;
  std::fill(row, row + length, T(0));
  for (int64_t i = b * call.units_per_sample; i < (b + 1) * call.units_per_sample; ++i) {
    const Unit& unit = call.units[i];
    const int64_t dz = z - unit.native_z[l], dy = y - unit.native_y[l];
    if (dz < 0 || dz >= unit.native_nz[l] || dy < 0 || dy >= unit.native_ny[l]) continue;
    const T* from = problem.native_grads + unit.native_offset[l] + (dz * unit.native_ny[l] + dy) * length;
    for (int64_t k = 0; k < length; ++k) row[k] += from[k];
  }
  const int64_t C = problem.num_classes, count = are_neighbours(scale.axis[2], 0, columns) ? columns : 1;
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t x = 0; x < columns; x += count) {
      store_grads(scale, problem.logit_type, b, c, z, y, x, count, row + x * C + c, C);
    }
  }
}

template <typename T>
void gather_native(const Call<T>& call, int64_t l) {
  const Scale<T>& scale = call.problem.scales[l];
  const int64_t height = scale.axis[1].kept, rows = scale.axis[0].kept * height;
  at::parallel_for(0, call.batch * rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> row(static_cast<size_t>(scale.axis[2].kept * call.problem.num_classes));
    for (int64_t i = begin; i < end; ++i) {
      gather_row(call, l, i / rows, i % rows / height, i % height, row.data());
    }
  });
}

// Gradients of the projections of all units. Units share a slot in runs of fixed length: at most 48 MiB of slots, or 8
// slots where those are larger (they take 8 K (C + 1)^2 bytes each: 113 MiB in all at L = 4, C = 256).
template <typename T>
class ProjectionSums {
 public:
  ProjectionSums(const Call<T>& call, int64_t num_units) : call_(call), columns_(call.problem.num_classes + 1) {
    for (int64_t l = 0; l < call.problem.num_scales; ++l) {
      offset_[l] = slot_size_;
      slot_size_ += call.problem.scales[l].rows * columns_;
    }
    constexpr int64_t kMaxDoubles = 6 << 20, kMinSlots = 8;
    slots = std::min(num_units, std::max(kMinSlots, kMaxDoubles / std::max<int64_t>(slot_size_, 1)));
    sums_.assign(static_cast<size_t>(std::max<int64_t>(slots, 1) * slot_size_), 0.0);  // an empty batch has no slot
  }

  ProjectionGrads slot(int64_t i) {
    ProjectionGrads grads{};
    for (int64_t l = 0; l < call_.problem.num_scales; ++l) grads.scale[l] = sums_.data() + i * slot_size_ + offset_[l];
    return grads;
  }

  // Add up the slots into the gradients of W, b, u and v. A bias meets all pixels through each member's rows alike, so
  // the last column of the first member's rows is its gradient.
  std::vector<at::Tensor> parameters(const Inputs& inputs) {
    for (int64_t i = 1; i < slots; ++i) {
      for (int64_t k = 0; k < slot_size_; ++k) sums_[k] += sums_[i * slot_size_ + k];
    }
    std::vector<at::Tensor> outputs;
    for (const auto* given : {&inputs.cat_weight, &inputs.cat_bias, &inputs.awf_weight, &inputs.awf_bias}) {
      const auto options = inputs.logits[0].options().dtype(c10::CppTypeToScalarType<T>::value);
      outputs.push_back(given->has_value() ? at::zeros((*given)->sizes(), options) : at::empty({0}, options));
    }
    T *weight = data(outputs[0]), *bias = data(outputs[1]), *score = data(outputs[2]), *score_bias = data(outputs[3]);
    const int64_t C = columns_ - 1;
    for (const Subset& subset : call_.subsets()) {
      for (int j = 0; j < subset.size; ++j) {
        const int64_t pair = subset.first_pair + j;
        const double* scale = sums_.data() + offset_[subset.members[j]];
        for (int64_t o = 0; subset.cat_row[j] >= 0 && o < C; ++o) {
          const double* row = scale + (subset.cat_row[j] + o) * columns_;
          for (int64_t c = 0; c < C; ++c) weight[(pair * C + o) * C + c] = static_cast<T>(row[c]);
          if (j == 0) bias[subset.index * C + o] = static_cast<T>(row[C]);
        }
        if (subset.awf_row[j] < 0) continue;
        const double* row = scale + subset.awf_row[j] * columns_;
        for (int64_t c = 0; c < C; ++c) score[pair * C + c] = static_cast<T>(row[c]);
        score_bias[pair] = static_cast<T>(row[C]);
      }
    }
    return outputs;
  }

  int64_t slots = 0;

 private:
  static T* data(at::Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.template mutable_data_ptr<T>(); }

  const Call<T>& call_;
  int64_t columns_;
  std::array<int64_t, kMaxScales> offset_{};
  int64_t slot_size_ = 0;
  std::vector<double> sums_;
};

template <typename T>
std::vector<at::Tensor> backward(const at::Tensor& grad_stats, const Inputs& inputs) {
  Call<T> call(inputs);
  Problem<T>& problem = call.problem;
  const int64_t num_units = static_cast<int64_t>(call.units.size());
  const int64_t B = call.batch, M = problem.num_maps, columns = 1 + 2 * problem.num_classes;
  TORCH_CHECK_VALUE(grad_stats.sizes() == at::IntArrayRef({B, M, columns}), "grad_stats: got shape ",
                    grad_stats.sizes(), ", expected [", B, ", ", M, ", ", columns, "]");
  const at::Tensor grads =
      grad_stats.to(c10::CppTypeToScalarType<T>::value, /*non_blocking=*/false, /*copy=*/true).contiguous();
  if (problem.squared) grads.narrow(2, 1 + problem.num_classes, problem.num_classes).mul_(2);  // of s^2, see softmax.h
  problem.grad_stats = grads.template const_data_ptr<T>();
  std::vector<at::Tensor> outputs;
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    Scale<T>& scale = problem.scales[l];
    const bool is_whole = scale.used && !has_gaps(scale);
    at::Tensor out = is_whole ? at::empty_like(inputs.logits[l]) : at::zeros_like(inputs.logits[l]);
    scale.grad = out.mutable_data_ptr();
    const int64_t axes = out.dim() - 2;
    scale.grad_stride[0] = out.stride(0);
    scale.grad_stride[1] = out.stride(1);
    for (int64_t axis = 0; axis < 3; ++axis) {
      const int64_t own = axis - (3 - axes);
      scale.grad_stride[2 + axis] = own < 0 ? 0 : out.stride(2 + own);
    }
    outputs.push_back(out);
  }
  const c10::DataPtr native = c10::GetCPUAllocator()->allocate(static_cast<size_t>(call.native_grad_size) * sizeof(T));
  problem.native_grads = static_cast<T*>(native.get());

  // 1. every unit: full-size gradients written, native ones kept apart, parameter gradients into the unit's slot
  ProjectionSums<T> sums(call, num_units);
  const Kernels<T>& run = kernels<T>();
  const int64_t scratch_size = run.backward_scratch(problem);
  at::parallel_for(0, sums.slots, 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(static_cast<size_t>(scratch_size));
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t first = num_units * slot / sums.slots, last = num_units * (slot + 1) / sums.slots;
      run.backward(problem, first, last, scratch.get(), sums.slot(slot));
    }
  });

  // 2. native gradients and parameter gradients added up in the order of the units
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    if (problem.scales[l].used && !problem.scales[l].identity) gather_native(call, l);
  }
  for (at::Tensor& gradient : sums.parameters(inputs)) outputs.push_back(std::move(gradient));
  return outputs;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> map_stats_forward(const Inputs& inputs) {
  check_inputs(inputs);
  return inputs.logits[0].scalar_type() == at::kDouble ? forward<double>(inputs) : forward<float>(inputs);
}

std::vector<at::Tensor> map_stats_backward(const at::Tensor& grad_stats, const Inputs& inputs) {
  check_inputs(inputs);
  return inputs.logits[0].scalar_type() == at::kDouble ? backward<double>(grad_stats, inputs)
                                                       : backward<float>(grad_stats, inputs);
}

}  // namespace lomix::cpu
