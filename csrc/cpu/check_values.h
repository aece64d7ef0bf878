// Looks at the values of a target before any work starts.
#pragma once

#include "../inputs.h"

namespace lomix::cpu {

// Raises ValueError (in Python) for a class number that is neither a class nor ignored, and for a dense value that is
// not from 0 to 1, marks of several classes under softmax, and a weight of a pixel below 0.
// `target` is that of the inputs, class numbers contiguous.
void check_values(const Inputs& inputs, const at::Tensor& target);

}  // namespace lomix::cpu
