// Element types that kernels read as they are.
#pragma once

namespace lomix {

enum class LogitType : int { kFloat, kDouble, kHalf, kBFloat16 };
// Of class numbers: the first five. Of dense targets and weights: all.
enum class LabelType : int { kUInt8, kInt8, kInt16, kInt32, kInt64, kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace lomix
