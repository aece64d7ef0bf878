// The supervised maps as compiled backends see them; lomix_fast/plan.py makes the list and owns its order.
#pragma once

namespace lomix {

constexpr int kMaxScales = 8;
constexpr int kMostMaps = 512;

// The same codes as OPERATOR_CODES in lomix_fast/plan.py.
enum class Operator : int { kOrig = 0, kAdd = 1, kMul = 2, kCat = 3, kAwf = 4, kSub = 5, kAvg = 6, kMax = 7 };
constexpr int kOperators = 8;

// A bounded product multiplies P / sqrt(1 + (P / kMulBound)^2); MUL_BOUND in lomix_fast/plan.py.
constexpr double kMulBound = 2;

}  // namespace lomix
