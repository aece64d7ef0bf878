#include "check_values.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <sstream>
#include <string>
#include <vector>

namespace lomix::cpu {
namespace {

template <typename Label>
int64_t first_bad_label(const Label* labels, int64_t begin, int64_t end, int64_t num_classes, const Rule& rule) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = static_cast<int64_t>(labels[i]);
    if ((label < 0 || label >= num_classes) && label != rule.ignore_index) return i;
  }
  return -1;
}

int64_t first_bad_label(const at::Tensor& labels, int64_t begin, int64_t end, int64_t num_classes, const Rule& rule) {
  const auto find = [&](const auto* data) { return first_bad_label(data, begin, end, num_classes, rule); };
  const void* data = labels.const_data_ptr();
  switch (label_type(labels.scalar_type())) {
    case LabelType::kUInt8: return find(static_cast<const uint8_t*>(data));
    case LabelType::kInt8: return find(static_cast<const int8_t*>(data));
    case LabelType::kInt16: return find(static_cast<const int16_t*>(data));
    case LabelType::kInt32: return find(static_cast<const int32_t*>(data));
    default: return find(static_cast<const int64_t*>(data));
  }
}

std::string position(const at::Tensor& target, int64_t at) {
  std::ostringstream where;
  int64_t rest = at, size = target.numel();
  for (int64_t axis = 0; axis < target.dim(); ++axis) {
    size /= target.size(axis);
    where << (axis == 0 ? "(" : ", ") << rest / size;
    rest %= size;
  }
  where << ")";
  return where.str();
}

void check_labels(const Inputs& inputs, const at::Tensor& labels) {
  constexpr int64_t kPart = 65536;
  const int64_t count = labels.numel(), parts = (count + kPart - 1) / kPart, classes = inputs.logits[0].size(1);
  std::vector<int64_t> bad(static_cast<size_t>(parts), -1);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      bad[static_cast<size_t>(i)] =
          first_bad_label(labels, i * kPart, std::min(count, (i + 1) * kPart), classes, inputs.rule);
    }
  });
  const auto found = std::find_if(bad.begin(), bad.end(), [](int64_t at) { return at >= 0; });
  if (found == bad.end()) return;
  const int64_t label = labels.flatten()[*found].item<int64_t>();
  const bool is_wrapped = labels.scalar_type() == at::kByte && label > 127;
  const std::string of_sign = is_wrapped ? ", which is what " + std::to_string(label - 256) + " becomes in uint8" : "";
  TORCH_CHECK_VALUE(false, "target: got the label ", label, " at index ", position(labels, *found),
                    ", expected labels in [0, ", classes, ") for ", classes,
                    " classes; remap the labels, raise num_classes, or pass ignore_index=", label, of_sign);
}

// How far a float share may lie outside 0 to 1; SHARE_SLACK in lomix_fast/labels.py.
constexpr double kSlack = 1e-3;

void check_shares(const Inputs& inputs) {
  at::Tensor values = inputs.target;
  if (values.numel() == 0) return;
  const bool are_marks = at::isIntegralType(values.scalar_type(), /*includeBool=*/true);
  if (values.scalar_type() != at::kBool) {
    if (inputs.rule.ignore_index) values = values.masked_fill(values.eq(*inputs.rule.ignore_index), 0);
    const double slack = are_marks ? 0 : kSlack;
    const auto [least, most] = at::aminmax(values);
    // In the target's own dtype, to which PyTorch rounds the limits too; NaN is outside.
    if (!least.ge(-slack).item<bool>() || !most.le(1 + slack).item<bool>()) {
      const at::Tensor good = at::logical_and(values.ge(-slack), values.le(1 + slack));
      const int64_t at = good.logical_not().flatten().nonzero()[0][0].item<int64_t>();
      std::ostringstream value;
      value << std::setprecision(9) << values.flatten()[at].item<double>();
      TORCH_CHECK_VALUE(false, "target: got the value ", value.str(), " at index ", position(values, at),
                        ", expected shares of each class from 0 to 1; masks of 0 and 255 must be divided or ",
                        "thresholded first, and pixels without a label left out with ignore_index= or mask=");
    }
  }
  if (!are_marks || inputs.rule.sigmoid || values.size(1) == 1) return;
  const at::Tensor marks = values.sum(1, /*keepdim=*/false, at::kInt);
  if (marks.eq(1).all().item<bool>()) return;
  const int64_t at = marks.ne(1).flatten().nonzero()[0][0].item<int64_t>();
  TORCH_CHECK_VALUE(false, "target: got marks of ", marks.flatten()[at].item<int64_t>(), " classes at pixel ",
                    position(marks, at), ", expected exactly one under softmax; for regions that overlap pass ",
                    "sigmoid=True, and leave pixels without a class out with mask=");
}

// LARGEST_WEIGHT in lomix_fast/target.py.
constexpr double kLargestWeight = 1e20;

void check_weights(const Inputs& inputs) {
  if (!inputs.weight_map || inputs.weight_map->scalar_type() == at::kBool || inputs.weight_map->numel() == 0) return;
  const at::Tensor& weight = *inputs.weight_map;
  const auto [least, most] = at::aminmax(weight);
  const double largest = most.item<double>();
  const bool is_far = largest > kLargestWeight || (largest > 0 && largest * kLargestWeight < 1);
  TORCH_CHECK_VALUE(!is_far || std::isinf(largest), "weight_map: got ", largest,
                    " as the largest weight, expected 0 or ", 1 / kLargestWeight, " to ", kLargestWeight,
                    ", for sums of float32 to hold them; multiply all of them by the same number");
  if (least.item<double>() >= 0) return;
  const at::Tensor found = weight.lt(0).flatten().nonzero();
  if (found.numel() == 0) return;  // NaN shows in the loss
  const int64_t at = found[0][0].item<int64_t>();
  std::ostringstream value;
  value << std::setprecision(9) << weight.flatten()[at].item<double>();
  TORCH_CHECK_VALUE(false, "weight_map: got the weight ", value.str(), " at index ", position(weight, at),
                    ", expected at least 0; shift or clamp the weights");
}

}  // namespace

void check_values(const Inputs& inputs, const at::Tensor& target) {
  inputs.is_dense() ? check_shares(inputs) : check_labels(inputs, target);
  check_weights(inputs);
}

}  // namespace lomix::cpu
