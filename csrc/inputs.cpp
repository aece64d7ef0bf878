#include "inputs.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

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

LabelType number_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return LabelType::kFloat;
    case at::kDouble: return LabelType::kDouble;
    case at::kHalf: return LabelType::kHalf;
    case at::kBFloat16: return LabelType::kBFloat16;
    case at::kBool:
    case at::kByte:
    case at::kChar:
    case at::kShort:
    case at::kInt:
    case at::kLong: return label_type(type);
    default:
      TORCH_CHECK_VALUE(false, "target or weight_map: got ", type,
                        ", expected bool, a signed integer, uint8, or float16 to float64; convert it");
  }
}

int64_t num_pairs(const Inputs& inputs) {
  if (inputs.cat_weight.has_value()) return inputs.cat_weight->size(0);
  return inputs.awf_weight.has_value() ? inputs.awf_weight->size(0) : 0;
}

int64_t num_subsets(const Inputs& inputs) { return inputs.cat_bias.has_value() ? inputs.cat_bias->size(0) : 0; }

std::array<int64_t, 3> as_zyx(at::IntArrayRef values, size_t first, int64_t missing) {
  std::array<int64_t, 3> zyx = {missing, missing, missing};
  const size_t axes = values.size() - first;
  for (size_t i = 0; i < axes; ++i) zyx[3 - axes + i] = values[first + i];
  return zyx;
}

namespace {

bool has_pixels(const at::Tensor& t, int64_t first_axis) {
  const at::IntArrayRef sizes = t.sizes();
  return std::all_of(sizes.begin() + first_axis, sizes.end(), [](int64_t n) { return n > 0; });
}

// Kernels count pixels along an axis in 32 bits, and multiply two of such numbers in 64.
void check_axes(const char* name, const at::Tensor& t, int64_t first_axis) {
  const at::IntArrayRef sizes = t.sizes();
  TORCH_CHECK_VALUE(std::all_of(sizes.begin() + first_axis, sizes.end(), [](int64_t n) { return n < kMostPixels; }),
                    name, ": got shape ", sizes, ", expected less than ", kMostPixels,
                    " pixels along an axis; cut it into parts, or use impl='eager'");
}

void check_logits(const Inputs& inputs) {
  const int64_t L = static_cast<int64_t>(inputs.logits.size());
  TORCH_CHECK_VALUE(L >= 1 && L <= kMaxScales, "logits: got ", L, " tensors, expected 1 to ", kMaxScales);
  const at::Tensor& first = inputs.logits[0];
  const int64_t C = first.dim() >= 3 && first.dim() <= 5 ? first.size(1) : 0;
  TORCH_CHECK_VALUE(C >= 1, "logits[0]: got shape ", first.sizes(), ", expected [B, C, *native]");
  TORCH_CHECK_VALUE(C <= kMostClasses, "logits: got ", C, " classes, expected at most ", kMostClasses);
  for (const at::Tensor& z : inputs.logits) {
    TORCH_CHECK_VALUE(z.dim() == first.dim() && z.size(0) == first.size(0) && z.size(1) == C &&
                          z.scalar_type() == first.scalar_type() && z.device() == first.device(),
                      "logits: got ", z.toString(), " ", z.sizes(), ", expected what logits[0] has: ", first.toString(),
                      " ", first.sizes());
    const at::ScalarType type = z.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
                      "logits: got ", type, ", expected float16, bfloat16, float32 or float64");
    TORCH_CHECK_VALUE(has_pixels(z, 2), "logits: got shape ", z.sizes(), ", expected at least one pixel");
    check_axes("logits", z, 2);
  }
}

void check_target(const Inputs& inputs) {
  const at::Tensor &first = inputs.logits[0], &target = inputs.target;
  const Rule& rule = inputs.rule;
  const int64_t C = first.size(1);
  TORCH_CHECK_VALUE((target.dim() == first.dim() - 1 || (target.dim() == first.dim() && target.size(1) == C)) &&
                        target.size(0) == first.size(0) && target.device() == first.device(),
                    "target: got ", target.toString(), " ", target.sizes(), ", expected class numbers [B, *full] or ",
                    "values [B, C, *full] on ", first.device());
  TORCH_CHECK_VALUE(has_pixels(target, 1), "target: got shape ", target.sizes(), ", expected at least one pixel");
  check_axes("target", target, inputs.is_dense() ? 2 : 1);
  const bool is_dense = inputs.is_dense();
  is_dense ? number_type(target.scalar_type()) : label_type(target.scalar_type());  // raise for those no kernel reads
  TORCH_CHECK_VALUE(is_dense || !rule.sigmoid,
                    "target: got class numbers, expected values [B, C, *full] under sigmoid");
  TORCH_CHECK_VALUE(!is_dense || C == 1 || !rule.ignore_index, "ignore_index: got ", rule.ignore_index.value_or(0),
                    " with a target of ", C, " values a pixel, expected None");
  TORCH_CHECK_VALUE(rule.label_smoothing >= 0 && rule.label_smoothing <= 1, "label_smoothing: got ",
                    rule.label_smoothing, ", expected 0 to 1");
  TORCH_CHECK_VALUE(!rule.sigmoid || rule.label_smoothing == 0, "label_smoothing: got ", rule.label_smoothing,
                    " under sigmoid, expected 0");
  if (inputs.weight_map.has_value()) {
    const at::Tensor& weight = *inputs.weight_map;
    std::vector<int64_t> expected{target.sizes().vec()};
    if (is_dense) expected.erase(expected.begin() + 1);
    TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(expected) && weight.device() == first.device(),
                      "weight_map: got shape ", weight.sizes(), " on ", weight.device(), ", expected ",
                      at::IntArrayRef(expected), " on ", first.device());
    number_type(weight.scalar_type());
  }
}

void check_parameters(const Inputs& inputs) {
  const at::Tensor& first = inputs.logits[0];
  const int64_t C = first.size(1), K = num_pairs(inputs), S = num_subsets(inputs);
  const auto expect = [&](const char* name, const std::optional<at::Tensor>& given, at::IntArrayRef shape) {
    if (!given.has_value()) return;
    TORCH_CHECK_VALUE(given->sizes() == shape, name, ": got shape ", given->sizes(), ", expected ", shape);
    TORCH_CHECK_VALUE(given->device() == first.device() && given->is_floating_point(), name, ": got ",
                      given->toString(), " on ", given->device(), ", expected floats on ", first.device());
  };
  expect("ce_weight", inputs.ce_weight, {C});
  expect("cat_weight", inputs.cat_weight, {K, C, C});
  expect("cat_bias", inputs.cat_bias, {S, C});
  expect("awf_weight", inputs.awf_weight, {K, C});
  expect("awf_bias", inputs.awf_bias, {K});
}

void check_maps(const Inputs& inputs) {
  TORCH_CHECK_VALUE(inputs.maps.size() % 4 == 0, "maps: got ", inputs.maps.size(), " integers, expected four a map");
  TORCH_CHECK_VALUE(inputs.maps.size() <= 4 * kMostMaps, "maps: got ", inputs.maps.size() / 4, ", expected at most ",
                    kMostMaps);
  const int64_t L = static_cast<int64_t>(inputs.logits.size()), K = num_pairs(inputs), S = num_subsets(inputs);
  std::set<std::pair<int64_t, int64_t>> seen;
  std::map<int64_t, int64_t> owners;                    // of each row of b, then of W and u: a set of members
  std::map<int64_t, std::pair<int64_t, int64_t>> rows;  // of each set of members: of b, and the first of W and u
  for (size_t i = 0; i < inputs.maps.size(); i += 4) {
    const int64_t op = inputs.maps[i], mask = inputs.maps[i + 1], subset = inputs.maps[i + 2],
                  pair = inputs.maps[i + 3];
    TORCH_CHECK_VALUE(op >= 0 && op < kOperators && mask > 0 && mask >> L == 0, "maps: got operator ", op,
                      " with members ", mask, ", which no plan of ", L, " scales has");
    const int64_t members = __builtin_popcountll(mask);
    TORCH_CHECK_VALUE(op == 0 ? members == 1 : members > 1 && subset >= 0 && pair >= 0, "maps: got operator ", op,
                      " with members ", mask, " of subset ", subset,
                      ", expected one member of an original and two or more of a mix, with its rows");
    TORCH_CHECK_VALUE(seen.emplace(op, mask).second, "maps: got operator ", op, " with members ", mask,
                      " twice, expected each map once");
    const std::pair<int64_t, int64_t> own{subset, pair};
    TORCH_CHECK_VALUE(op == 0 || rows.emplace(mask, own).first->second == own, "maps: got rows ", own.first, " and ",
                      own.second, " for members ", mask, ", expected those of its other maps");
    const bool is_cat = op == static_cast<int64_t>(Operator::kCat), is_awf = op == static_cast<int64_t>(Operator::kAwf);
    TORCH_CHECK_VALUE(!is_cat || (inputs.cat_weight && inputs.cat_bias),
                      "cat_weight and cat_bias: got None, expected tensors because the plan has 'cat'");
    TORCH_CHECK_VALUE(!is_awf || (inputs.awf_weight && inputs.awf_bias),
                      "awf_weight and awf_bias: got None, expected tensors because the plan has 'awf'");
    // Written so that no sum overflows; the kernels keep rows in 16 bits.
    constexpr int64_t kMostRows = int64_t{1} << 16;
    TORCH_CHECK_VALUE(subset < kMostRows && pair < kMostRows && (!is_cat || subset < S) &&
                          (!(is_cat || is_awf) || pair <= K - members),
                      "maps: got rows ", subset, " and ", pair, " for operator ", op, " with members ", mask,
                      ", which no plan with ", K, " pairs has");
    if (is_cat) owners.emplace(subset, mask);
    for (int64_t row = pair; (is_cat || is_awf) && row < pair + members; ++row) owners.emplace(kMostRows + row, mask);
    const auto is_own = [&](int64_t row) { return owners.count(row) == 0 || owners[row] == mask; };
    bool are_own = !is_cat || is_own(subset);
    for (int64_t row = pair; (is_cat || is_awf) && row < pair + members; ++row) are_own &= is_own(kMostRows + row);
    TORCH_CHECK_VALUE(are_own, "maps: got rows ", subset, " and ", pair, " for members ", mask,
                      ", expected rows that no other members have");
  }
}

}  // namespace

void check_inputs(const Inputs& inputs) {
  check_logits(inputs);
  check_target(inputs);
  check_parameters(inputs);
  check_maps(inputs);
}

}  // namespace lomix
