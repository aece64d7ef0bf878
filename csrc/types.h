// Element types that kernels read as they are.
#pragma once

namespace lomix {

enum class LogitType : int { kFloat, kDouble, kHalf, kBFloat16 };
enum class LabelType : int { kUInt8, kInt8, kInt16, kInt32, kInt64 };

}  // namespace lomix
