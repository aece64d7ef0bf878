// The supervised maps as compiled backends see them; lomix_fast/plan.py makes the list and owns its order.
#pragma once

#include <cstdint>

namespace lomix {

constexpr int kMaxScales = 6;

// The same codes as OPERATOR_CODES in lomix_fast/plan.py.
enum class Operator : int { kOrig = 0, kAdd = 1, kMul = 2, kCat = 3, kAwf = 4 };

// One map. Member number i of a cat or awf map owns row `first_pair + i` of W [K, C, C] or u [K, C].
struct MapSpec {
  Operator op;
  int num_members;
  int members[kMaxScales];  // increasing scale numbers, 0 the coarsest
  int subset;               // row of b [S, C]
  int first_pair;
};

}  // namespace lomix
