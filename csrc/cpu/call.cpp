#include "call.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace lomix::cpu {
namespace {

// Enough units to keep many cores busy; fixed, so that the order of every sum is the same on every machine.
constexpr int64_t kTargetUnits = 96;
constexpr int64_t kMinPixelsPerUnit = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

LogitType logit_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return LogitType::kDouble;
    case at::kHalf: return LogitType::kHalf;
    case at::kBFloat16: return LogitType::kBFloat16;
    default: return LogitType::kFloat;
  }
}

LabelType label_type(at::ScalarType type) {
  switch (type) {
    case at::kBool:
    case at::kByte: return LabelType::kUInt8;
    case at::kChar: return LabelType::kInt8;
    case at::kShort: return LabelType::kInt16;
    case at::kInt: return LabelType::kInt32;
    default: return LabelType::kInt64;
  }
}

// Sizes or strides of the spatial axes as z, y, x; missing leading axes have `missing`.
std::array<int64_t, 3> as_zyx(at::IntArrayRef values, size_t first, int64_t missing) {
  std::array<int64_t, 3> zyx = {missing, missing, missing};
  const size_t axes = values.size() - first;
  for (size_t i = 0; i < axes; ++i) zyx[3 - axes + i] = values[first + i];
  return zyx;
}

}  // namespace

void check_inputs(const Inputs& inputs) {
  const int64_t L = static_cast<int64_t>(inputs.logits.size());
  TORCH_CHECK_VALUE(L >= 1 && L <= kMaxScales, "logits: got ", L, " tensors, expected 1 to ", kMaxScales);
  const at::Tensor& first = inputs.logits[0];
  const int64_t C = first.dim() >= 3 && first.dim() <= 5 ? first.size(1) : 0;
  TORCH_CHECK_VALUE(C >= 1, "logits[0]: got shape ", first.sizes(), ", expected [B, C, *native]");
  for (const at::Tensor& z : inputs.logits) {
    TORCH_CHECK_VALUE(z.dim() == first.dim() && z.size(0) == first.size(0) && z.size(1) == C &&
                          z.scalar_type() == first.scalar_type() && z.device().is_cpu(),
                      "logits: got ", z.toString(), " ", z.sizes(), ", expected what logits[0] has: ", first.toString(),
                      " ", first.sizes());
  }
  TORCH_CHECK_VALUE(
      inputs.target.dim() == first.dim() - 1 && inputs.target.size(0) == first.size(0) &&
          inputs.target.device().is_cpu() && at::isIntegralType(inputs.target.scalar_type(), /*includeBool=*/true),
      "target: got ", inputs.target.toString(), " ", inputs.target.sizes(), ", expected integers [B, *full] on CPU");
  TORCH_CHECK_VALUE(inputs.maps.size() % 4 == 0, "maps: got ", inputs.maps.size(), " integers, expected four a map");
  const int64_t S = (int64_t{1} << L) - 1 - L, K = L * (int64_t{1} << (L - 1)) - L;
  const auto expect = [](const char* name, const std::optional<at::Tensor>& given, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(!given.has_value() || given->sizes() == shape, name, ": got shape ", given->sizes(),
                      ", expected ", shape);
  };
  expect("cat_weight", inputs.cat_weight, {K, C, C});
  expect("cat_bias", inputs.cat_bias, {S, C});
  expect("awf_weight", inputs.awf_weight, {K, C});
  expect("awf_bias", inputs.awf_bias, {K});
  for (size_t i = 0; i < inputs.maps.size(); i += 4) {
    const int64_t op = inputs.maps[i], mask = inputs.maps[i + 1], subset = inputs.maps[i + 2];
    const bool known = op >= 0 && op <= static_cast<int64_t>(Operator::kAwf) && mask > 0 && mask >> L == 0;
    TORCH_CHECK_VALUE(known && subset < S && inputs.maps[i + 3] + __builtin_popcountll(mask) <= K + (op == 0 ? L : 0),
                      "maps: got operator ", op, " with members ", mask, ", which no plan of ", L, " scales has");
    TORCH_CHECK_VALUE(op != static_cast<int64_t>(Operator::kCat) || (inputs.cat_weight && inputs.cat_bias),
                      "cat_weight and cat_bias: got None, expected tensors because the plan has 'cat'");
    TORCH_CHECK_VALUE(op != static_cast<int64_t>(Operator::kAwf) || (inputs.awf_weight && inputs.awf_bias),
                      "awf_weight and awf_bias: got None, expected tensors because the plan has 'awf'");
  }
}

template <typename T>
Call<T>::Call(const Inputs& inputs) {
  const at::Tensor& first = inputs.logits[0];
  batch = first.size(0);
  problem.num_scales = static_cast<int64_t>(inputs.logits.size());
  problem.num_classes = first.size(1);
  problem.squared = inputs.squared;
  problem.logit_type = logit_type(first.scalar_type());
  problem.label_type = label_type(inputs.target.scalar_type());
  const std::array<int64_t, 3> full = as_zyx(inputs.target.sizes(), 1, 1);
  problem.depth = full[0];
  problem.height = full[1];
  problem.width = full[2];
  kept_.push_back(inputs.target.contiguous());
  problem.labels = kept_.back().const_data_ptr();
  problem.num_pairs = problem.num_scales * (int64_t{1} << (problem.num_scales - 1)) - problem.num_scales;
  problem.num_subsets = (int64_t{1} << problem.num_scales) - 1 - problem.num_scales;
  problem.cat_weight = parameter(inputs.cat_weight);
  problem.cat_bias = parameter(inputs.cat_bias);
  problem.awf_weight = parameter(inputs.awf_weight);
  problem.awf_bias = parameter(inputs.awf_bias);
  read_plan(inputs);
  read_scales(inputs);
  make_units();
}

template <typename T>
const T* Call<T>::parameter(const std::optional<at::Tensor>& given) {
  if (!given.has_value()) return nullptr;
  kept_.push_back(given->to(c10::CppTypeToScalarType<T>::value).contiguous());
  return kept_.back().template const_data_ptr<T>();
}

template <typename T>
void Call<T>::read_plan(const Inputs& inputs) {
  for (size_t i = 0; i + 3 < inputs.maps.size(); i += 4) {
    MapSpec spec{};
    spec.op = static_cast<Operator>(inputs.maps[i]);
    for (int l = 0; l < kMaxScales; ++l) {
      if ((inputs.maps[i + 1] >> l & 1) != 0) {
        spec.members[spec.num_members++] = l;
        problem.scales[l].used = true;
      }
    }
    spec.subset = static_cast<int>(inputs.maps[i + 2]);
    spec.first_pair = static_cast<int>(inputs.maps[i + 3]);
    maps_.push_back(spec);
  }
  problem.maps = maps_.data();
  problem.num_maps = static_cast<int64_t>(maps_.size());
}

template <typename T>
void Call<T>::read_scales(const Inputs& inputs) {
  const std::array<int64_t, 3> full = {problem.depth, problem.height, problem.width};
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    const at::Tensor& z = inputs.logits[l];
    Scale<T>& scale = problem.scales[l];
    scale.logits = z.const_data_ptr();
    const std::array<int64_t, 3> size = as_zyx(z.sizes(), 2, 1), stride = as_zyx(z.strides(), 2, 0);
    scale.stride[0] = z.stride(0);
    scale.stride[1] = z.stride(1);
    scale.identity = size == full;
    for (int axis = 0; axis < 3; ++axis) {
      scale.size[axis] = size[axis];
      scale.stride[2 + axis] = stride[axis];
      make_axis(l, axis, size[axis], full[axis]);
    }
  }
}

// Source coordinates as torch.nn.functional.interpolate has them with align_corners=False.
template <typename T>
void Call<T>::make_axis(int64_t scale, int axis, int64_t native, int64_t full) {
  std::vector<Index>&lo = index_[scale][2 * axis], &hi = index_[scale][2 * axis + 1];
  std::vector<T>& frac = frac_[scale][axis];
  lo.resize(full);
  hi.resize(full);
  frac.resize(full);
  const double ratio = static_cast<double>(native) / static_cast<double>(full);
  for (int64_t i = 0; i < full; ++i) {
    const double source = std::max(0.0, (static_cast<double>(i) + 0.5) * ratio - 0.5);
    const int64_t below = std::min(static_cast<int64_t>(source), native - 1);
    lo[i] = static_cast<Index>(below);
    hi[i] = static_cast<Index>(std::min(below + 1, native - 1));
    frac[i] = native == full ? T(0) : static_cast<T>(source - static_cast<double>(below));
  }
  problem.scales[scale].axis[axis] = {lo.data(), hi.data(), frac.data()};
}

template <typename T>
void Call<T>::make_units() {
  const int64_t pixels = problem.depth * problem.height * problem.width;
  const int64_t wanted =
      std::min(ceil_div(kTargetUnits, std::max<int64_t>(batch, 1)), std::max<int64_t>(pixels / kMinPixelsPerUnit, 1));
  const int64_t along_z = std::min(problem.depth, wanted);
  const int64_t along_y = std::min(problem.height, ceil_div(wanted, along_z));
  units_per_sample = along_z * along_y;
  units.reserve(static_cast<size_t>(batch * units_per_sample));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < along_z; ++i) {
      for (int64_t j = 0; j < along_y; ++j) {
        Unit unit{};
        unit.batch = b;
        unit.z_begin = problem.depth * i / along_z;
        unit.z_end = problem.depth * (i + 1) / along_z;
        unit.y_begin = problem.height * j / along_y;
        unit.y_end = problem.height * (j + 1) / along_y;
        for (int64_t l = 0; l < problem.num_scales; ++l) {
          const Scale<T>& scale = problem.scales[l];
          if (!scale.used || scale.identity) continue;
          unit.native_z[l] = scale.axis[0].lo[unit.z_begin];
          unit.native_nz[l] = scale.axis[0].hi[unit.z_end - 1] - unit.native_z[l] + 1;
          unit.native_y[l] = scale.axis[1].lo[unit.y_begin];
          unit.native_ny[l] = scale.axis[1].hi[unit.y_end - 1] - unit.native_y[l] + 1;
          unit.native_offset[l] = native_grad_size;
          native_grad_size += unit.native_nz[l] * unit.native_ny[l] * scale.size[2] * problem.num_classes;
        }
        units.push_back(unit);
      }
    }
  }
  problem.units = units.data();
}

template class Call<float>;
template class Call<double>;

}  // namespace lomix::cpu
