#include "inputs.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

namespace lomix {

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
    case at::kLong: return LabelType::kInt64;
    default:
      TORCH_CHECK_VALUE(false, "target: got ", type, ", expected bool, uint8, int8, int16, int32 or int64; convert it");
  }
}

std::array<int64_t, 3> as_zyx(at::IntArrayRef values, size_t first, int64_t missing) {
  std::array<int64_t, 3> zyx = {missing, missing, missing};
  const size_t axes = values.size() - first;
  for (size_t i = 0; i < axes; ++i) zyx[3 - axes + i] = values[first + i];
  return zyx;
}

void check_inputs(const Inputs& inputs) {
  const int64_t L = static_cast<int64_t>(inputs.logits.size());
  TORCH_CHECK_VALUE(L >= 1 && L <= kMaxScales, "logits: got ", L, " tensors, expected 1 to ", kMaxScales);
  const at::Tensor& first = inputs.logits[0];
  const int64_t C = first.dim() >= 3 && first.dim() <= 5 ? first.size(1) : 0;
  TORCH_CHECK_VALUE(C >= 1, "logits[0]: got shape ", first.sizes(), ", expected [B, C, *native]");
  for (const at::Tensor& z : inputs.logits) {
    TORCH_CHECK_VALUE(z.dim() == first.dim() && z.size(0) == first.size(0) && z.size(1) == C &&
                          z.scalar_type() == first.scalar_type() && z.device() == first.device(),
                      "logits: got ", z.toString(), " ", z.sizes(), ", expected what logits[0] has: ", first.toString(),
                      " ", first.sizes());
  }
  TORCH_CHECK_VALUE(inputs.target.dim() == first.dim() - 1 && inputs.target.size(0) == first.size(0) &&
                        inputs.target.device() == first.device() &&
                        at::isIntegralType(inputs.target.scalar_type(), /*includeBool=*/true),
                    "target: got ", inputs.target.toString(), " ", inputs.target.sizes(),
                    ", expected integers [B, *full] on ", first.device());
  const auto has_pixels = [](const at::Tensor& t, int64_t first_axis) {
    const at::IntArrayRef sizes = t.sizes();
    return std::all_of(sizes.begin() + first_axis, sizes.end(), [](int64_t n) { return n > 0; });
  };
  for (const at::Tensor& z : inputs.logits) {
    TORCH_CHECK_VALUE(has_pixels(z, 2), "logits: got shape ", z.sizes(), ", expected at least one pixel");
  }
  TORCH_CHECK_VALUE(has_pixels(inputs.target, 1), "target: got shape ", inputs.target.sizes(),
                    ", expected at least one pixel");
  TORCH_CHECK_VALUE(inputs.maps.size() % 4 == 0, "maps: got ", inputs.maps.size(), " integers, expected four a map");
  const int64_t S = (int64_t{1} << L) - 1 - L, K = L * (int64_t{1} << (L - 1)) - L;
  label_type(inputs.target.scalar_type());  // raises for those that no kernel reads
  const auto expect = [&](const char* name, const std::optional<at::Tensor>& given, at::IntArrayRef shape) {
    if (!given.has_value()) return;
    TORCH_CHECK_VALUE(given->sizes() == shape, name, ": got shape ", given->sizes(), ", expected ", shape);
    TORCH_CHECK_VALUE(given->device() == first.device() && given->is_floating_point(), name, ": got ",
                      given->toString(), " on ", given->device(), ", expected floats on ", first.device());
  };
  expect("cat_weight", inputs.cat_weight, {K, C, C});
  expect("cat_bias", inputs.cat_bias, {S, C});
  expect("awf_weight", inputs.awf_weight, {K, C});
  expect("awf_bias", inputs.awf_bias, {K});
  std::set<std::pair<int64_t, int64_t>> seen;
  std::map<int64_t, std::pair<int64_t, int64_t>> rows;  // of each set of members: of b, and the first of W and u
  for (size_t i = 0; i < inputs.maps.size(); i += 4) {
    const int64_t op = inputs.maps[i], mask = inputs.maps[i + 1], subset = inputs.maps[i + 2];
    const bool known = op >= 0 && op <= static_cast<int64_t>(Operator::kAwf) && mask > 0 && mask >> L == 0;
    TORCH_CHECK_VALUE(known && subset < S && inputs.maps[i + 3] + __builtin_popcountll(mask) <= K + (op == 0 ? L : 0),
                      "maps: got operator ", op, " with members ", mask, ", which no plan of ", L, " scales has");
    TORCH_CHECK_VALUE(op == 0 ? __builtin_popcountll(mask) == 1
                              : __builtin_popcountll(mask) > 1 && subset >= 0 && inputs.maps[i + 3] >= 0,
                      "maps: got operator ", op, " with members ", mask, " of subset ", subset,
                      ", expected one member of an original and two or more of a mix, with its rows");
    TORCH_CHECK_VALUE(seen.emplace(op, mask).second, "maps: got operator ", op, " with members ", mask,
                      " twice, expected each map once");
    const std::pair<int64_t, int64_t> own{subset, inputs.maps[i + 3]};
    TORCH_CHECK_VALUE(op == 0 || rows.emplace(mask, own).first->second == own, "maps: got rows ", own.first, " and ",
                      own.second, " for members ", mask, ", expected those of its other maps");
    TORCH_CHECK_VALUE(op != static_cast<int64_t>(Operator::kCat) || (inputs.cat_weight && inputs.cat_bias),
                      "cat_weight and cat_bias: got None, expected tensors because the plan has 'cat'");
    TORCH_CHECK_VALUE(op != static_cast<int64_t>(Operator::kAwf) || (inputs.awf_weight && inputs.awf_bias),
                      "awf_weight and awf_bias: got None, expected tensors because the plan has 'awf'");
  }
}

}  // namespace lomix
