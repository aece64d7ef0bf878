// The supervised maps as compiled backends see them; lomix_fast/plan.py makes the list and owns its order.
#pragma once

namespace lomix {

constexpr int kMaxScales = 6;

// The same codes as OPERATOR_CODES in lomix_fast/plan.py.
enum class Operator : int { kOrig = 0, kAdd = 1, kMul = 2, kCat = 3, kAwf = 4 };

}  // namespace lomix
