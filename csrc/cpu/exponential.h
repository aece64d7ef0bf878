// exp of numbers that are never positive: what a softmax needs once its largest logit is subtracted.
#pragma once

#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// at::vec's exp for any other type than float.
template <typename T>
Vec<T> exp_nonpositive(const Vec<T>& x) {
  return x.exp();
}

// Half the instructions of at::vec's exp_u20, which also serves large positive numbers and flushes to zero: relative
// error at most 3e-7, at least exp(-87) = 1.6e-38. NaN stays NaN; infinite logits have become NaN by the subtraction.
//   x = n ln 2 + r, |r| <= ln 2 / 2;  exp(x) = 2^n p(r), p of degree 5 with p(0) = 1 and least relative error there
template <>
inline Vec<float> exp_nonpositive<float>(const Vec<float>& given) {
  const Vec<float> x = at::vec::clamp_min(given, Vec<float>(-87.0f));
  const Vec<float> n = (x * Vec<float>(1.44269504f)).round();
  Vec<float> r = at::vec::fmadd(n, Vec<float>(-0.693359375f), x);  // ln 2 in two parts, the first exact in n * it
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  Vec<float> p = at::vec::fmadd(r, Vec<float>(0.00829027221f), Vec<float>(0.0418981612f));
  p = at::vec::fmadd(p, r, Vec<float>(0.166676387f));
  p = at::vec::fmadd(p, r, Vec<float>(0.499991477f));
  p = at::vec::fmadd(p, r, Vec<float>(0.999999702f));
  p = at::vec::fmadd(p, r, Vec<float>(1.0f));
  // 2^n: the bits (n + 127) * 2^23, exact as a float before they become an integer
  const Vec<float> bits = at::vec::fmadd(n, Vec<float>(8388608.0f), Vec<float>(127.0f * 8388608.0f));
  return p * at::vec::cast<float>(at::vec::convert_to_int_of_same_size(bits));
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
