#include "call.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <utility>

#include "../mix_math.h"

namespace lomix::cpu {
namespace {

// Units of work: each large enough that the native rows it shares with its neighbours do not count, but a few at least,
// for many cores, and no more than sums are worth keeping for. They depend on sizes alone, so that the order of every
// sum is the same on every machine. A sample is one unit at least.
constexpr int64_t kPixelsPerUnit = 12288, kLeastPixelsPerUnit = 2048;
constexpr int64_t kFewUnits = 16, kManyUnits = 96;
// Of the enlarged rows that a pass keeps; the backward pass keeps their gradients as well.
constexpr int64_t kBlockBytes = 512 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <typename T>
Call<T>::Call(const Inputs& inputs) {
  const at::Tensor& first = inputs.logits[0];
  batch = first.size(0);
  problem.num_scales = static_cast<int64_t>(inputs.logits.size());
  problem.num_classes = first.size(1);
  problem.num_pairs = num_pairs(inputs);
  problem.squared = inputs.rule.squared;
  problem.logit_type = logit_type(first.scalar_type());
  const std::array<int64_t, 3> full = as_zyx(inputs.target.sizes(), inputs.is_dense() ? 2 : 1, 1);
  problem.depth = full[0];
  problem.height = full[1];
  problem.width = full[2];
  read_target(inputs);
  problem.cat_bias = parameter(inputs.cat_bias, kLog2E);
  problem.awf_bias = parameter(inputs.awf_bias, kLog2E);
  read_plan(inputs);
  read_scales(inputs);
  make_projections(inputs);
  choose_block_width();
  make_units();
}

template <typename T>
void Call<T>::read_target(const Inputs& inputs) {
  TargetData<T>& target = problem.target;
  const Rule& rule = inputs.rule;
  target.dense = inputs.is_dense();
  held_target = target.dense ? inputs.target : inputs.target.contiguous();
  target.values = held_target.const_data_ptr();
  if (target.dense) {
    const at::Tensor& values = inputs.target;
    const std::array<int64_t, 3> stride = as_zyx(values.strides(), 2, 0);
    target.type = number_type(values.scalar_type());
    target.stride[0] = values.stride(0);
    target.stride[1] = values.stride(1);
    std::copy(stride.begin(), stride.end(), target.stride + 2);
  } else {
    target.type = label_type(inputs.target.scalar_type());
  }
  if (inputs.weight_map.has_value()) {
    const at::Tensor& weight = *inputs.weight_map;
    const std::array<int64_t, 3> stride = as_zyx(weight.strides(), 1, 0);
    target.weight = weight.const_data_ptr();
    target.weight_type = number_type(weight.scalar_type());
    target.weight_stride[0] = weight.stride(0);
    std::copy(stride.begin(), stride.end(), target.weight_stride + 1);
  }
  target.weighted_ce = rule.weighted_ce;
  target.has_ignore = rule.ignore_index.has_value();
  target.ignore = rule.ignore_index.value_or(0);
  const bool is_mask = !inputs.weight_map || inputs.weight_map->scalar_type() == at::kBool || !rule.weighted_ce;
  target.unit_weights = is_mask && !inputs.ce_weight && rule.label_smoothing == 0 && !target.dense;
  target.uniform = !inputs.ce_weight;
  const at::Tensor ones = at::ones({problem.num_classes}, at::kDouble);
  const at::Tensor weight = inputs.ce_weight.has_value() ? inputs.ce_weight->to(at::kDouble) : ones;
  target.a = parameter(weight, 1 - rule.label_smoothing);
  target.b = parameter(weight, rule.label_smoothing / static_cast<double>(problem.num_classes));
  target.ce_weight = parameter(weight);
  bool has_extras = false;
  for (size_t i = 0; i < inputs.maps.size(); i += 4) {
    const auto op = static_cast<Operator>(inputs.maps[i]);
    has_extras |= op > Operator::kAwf;
    problem.bounded |= rule.bounded && op == Operator::kMul;
  }
  problem.kind = rule.sigmoid                                           ? Kind::kSigmoid
                 : inputs.is_plain() && !has_extras && !problem.bounded ? Kind::kPlain
                                                                        : Kind::kSoftmax;
}

template <typename T>
const T* Call<T>::parameter(const std::optional<at::Tensor>& given, double factor) {
  if (!given.has_value()) return nullptr;
  const at::Tensor cast = given->to(c10::CppTypeToScalarType<T>::value);
  kept_.push_back((factor == 1 ? cast : cast.mul(factor)).contiguous());
  return kept_.back().template const_data_ptr<T>();
}

template <typename T>
void Call<T>::read_plan(const Inputs& inputs) {
  std::fill(std::begin(problem.original), std::end(problem.original), -1);
  problem.num_maps = static_cast<int64_t>(inputs.maps.size() / 4);
  std::map<int64_t, size_t> place;  // of each set of members among the subsets
  for (int64_t m = 0; m < problem.num_maps; ++m) {
    const int64_t op = inputs.maps[4 * m], mask = inputs.maps[4 * m + 1];
    for (int l = 0; l < kMaxScales; ++l) problem.scales[l].used |= (mask >> l & 1) != 0;
    if (op == static_cast<int64_t>(Operator::kOrig)) {
      problem.original[__builtin_ctzll(mask)] = static_cast<int>(m);
      continue;
    }
    problem.has_add |= op == static_cast<int64_t>(Operator::kAdd);
    const auto [at, is_new] = place.try_emplace(mask, subsets_.size());
    if (is_new) {
      Subset subset{};
      std::fill(std::begin(subset.map), std::end(subset.map), -1);
      for (int l = 0; l < kMaxScales; ++l) {
        if ((mask >> l & 1) != 0) subset.members[subset.size++] = l;
      }
      subset.index = static_cast<int>(inputs.maps[4 * m + 2]);
      subset.first_pair = static_cast<int>(inputs.maps[4 * m + 3]);
      subsets_.push_back(subset);
    }
    subsets_[at->second].map[op] = static_cast<int>(m);
  }
  problem.subsets = subsets_.data();
  problem.num_subsets = static_cast<int64_t>(subsets_.size());
}

template <typename T>
void Call<T>::make_projections(const Inputs& inputs) {
  const T *weight = parameter(inputs.cat_weight), *score = parameter(inputs.awf_weight);
  const int64_t C = problem.num_classes;
  const auto append = [&](int64_t scale, const T* from, int64_t rows) {
    const int64_t first = problem.scales[scale].rows;
    projection_[scale].insert(projection_[scale].end(), from, from + rows * C);
    problem.scales[scale].rows += rows;
    return static_cast<int>(first);
  };
  for (Subset& subset : subsets_) {
    for (int j = 0; j < subset.size; ++j) {
      const int64_t pair = subset.first_pair + j, member = subset.members[j];
      subset.cat_row[j] = subset.of(Operator::kCat) < 0 ? -1 : append(member, weight + pair * C * C, C);
      subset.awf_row[j] = subset.of(Operator::kAwf) < 0 ? -1 : append(member, score + pair * C, 1);
    }
  }
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    Scale<T>& scale = problem.scales[l];
    scale.rows_padded = ceil_div(scale.rows, 4) * 4;
    projection_[l].resize(static_cast<size_t>(scale.rows_padded * C), T(0));
    scale.projection = projection_[l].data();
    for (T value : projection_[l]) projection_log2_[l].push_back(value * static_cast<T>(kLog2E));
    scale.projection_log2 = projection_log2_[l].data();
  }
}

// As many columns at once as keep the enlarged rows of all scales in the second-level cache, and at least a tile.
template <typename T>
void Call<T>::choose_block_width() {
  int64_t pixel_bytes = 0;
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    const Scale<T>& scale = problem.scales[l];
    if (scale.used) pixel_bytes += scale.slots * (scale.rows_padded + problem.num_classes) * sizeof(T);
  }
  const int64_t all = ceil_div(problem.width, kTileWidth);
  const int64_t most = std::max<int64_t>(kBlockBytes / std::max<int64_t>(pixel_bytes * kTileWidth, 1), 1);
  const int64_t blocks = ceil_div(all, most);
  problem.block_width = ceil_div(all, blocks) * kTileWidth;
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
    const Axis<T>& rows = scale.axis[1];
    for (int64_t y = 0; y < problem.height; ++y) {
      const int64_t last = std::min(y + kTileRows, problem.height) - 1;
      scale.slots = std::max<int64_t>(scale.slots, rows.hi[last] - rows.lo[y] + 1);
    }
  }
}

template <typename T>
void Call<T>::make_axis(int64_t scale, int axis, int64_t native, int64_t full) {
  std::vector<Index>&lo = index_[scale][2 * axis], &hi = index_[scale][2 * axis + 1];
  std::vector<T>& frac = frac_[scale][axis];
  std::vector<int64_t>& at = at_[scale][axis];
  lo.resize(full + kAxisPadding);
  hi.resize(full + kAxisPadding);
  frac.resize(full + kAxisPadding);
  for (int64_t i = 0; i < full; ++i) {
    const Source<double, int64_t> from = source<double, int64_t>(i, full, native);
    frac[i] = static_cast<T>(from.weight);
    // Among the last two that are read so far, or the next one.
    if (at.empty() || at.back() < from.low) at.push_back(from.low);
    const size_t low = at.back() == from.low ? at.size() - 1 : at.size() - 2;
    if (frac[i] != T(0) && low + 1 == at.size()) at.push_back(from.low + 1);
    lo[i] = static_cast<Index>(low);
    hi[i] = static_cast<Index>(frac[i] == T(0) ? low : low + 1);
  }
  std::fill(lo.begin() + full, lo.end(), lo[full - 1]);
  std::fill(hi.begin() + full, hi.end(), hi[full - 1]);
  std::fill(frac.begin() + full, frac.end(), frac[full - 1]);
  problem.scales[scale].axis[axis] = {lo.data(), hi.data(), frac.data(), at.data(), static_cast<int64_t>(at.size())};
}

template <typename T>
void Call<T>::make_units() {
  const int64_t pixels = problem.depth * problem.height * problem.width;
  const int64_t few = std::clamp<int64_t>(batch * pixels / kLeastPixelsPerUnit, 1, kFewUnits);
  const int64_t all = std::clamp<int64_t>(batch * pixels / kPixelsPerUnit, few, kManyUnits);
  const int64_t wanted = ceil_div(all, std::max<int64_t>(batch, 1));
  const int64_t slices = ceil_div(problem.depth, wanted);  // the same for all units, but for the last
  const int64_t along_z = ceil_div(problem.depth, slices);
  // Whole tiles, but for the last of them.
  const int64_t groups = ceil_div(problem.height, kTileRows);
  const int64_t along_y = std::min(groups, ceil_div(wanted, along_z));
  const auto border = [&](int64_t j) { return std::min(problem.height, groups * j / along_y * kTileRows); };
  units_per_sample = along_z * along_y;
  units.reserve(static_cast<size_t>(batch * units_per_sample));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < along_z; ++i) {
      for (int64_t j = 0; j < along_y; ++j) {
        Unit unit{};
        unit.batch = b;
        unit.z_begin = slices * i;
        unit.z_end = std::min(problem.depth, slices * (i + 1));
        unit.y_begin = border(j);
        unit.y_end = border(j + 1);
        for (int64_t l = 0; l < problem.num_scales; ++l) {
          const Scale<T>& scale = problem.scales[l];
          if (!scale.used || scale.identity) continue;
          unit.native_z[l] = scale.axis[0].lo[unit.z_begin];
          unit.native_nz[l] = scale.axis[0].hi[unit.z_end - 1] - unit.native_z[l] + 1;
          unit.native_y[l] = scale.axis[1].lo[unit.y_begin];
          unit.native_ny[l] = scale.axis[1].hi[unit.y_end - 1] - unit.native_y[l] + 1;
          unit.native_offset[l] = native_grad_size;
          native_grad_size += unit.native_nz[l] * unit.native_ny[l] * scale.axis[2].kept * problem.num_classes;
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
