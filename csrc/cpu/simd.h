// Vectors of the capability this file is compiled for: at::vec, and the few operations it lacks or does slowly.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
inline constexpr int64_t kWidth = Vec<T>::size();

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define LOMIX_X86_VECTORS 1
#endif

// For lambdas that hold vectors of a caller: as calls of their own they would pass registers through memory.
#define LOMIX_INLINE __attribute__((always_inline))

// Call f(0) .. f(kN - 1), unrolled.
template <int kN, typename F>
inline LOMIX_INLINE void repeat(const F& f) {
  const auto call = [&]<int... i>(std::integer_sequence<int, i...>) LOMIX_INLINE { (f(i), ...); };
  call(std::make_integer_sequence<int, kN>{});
}

// Largest of two. A NaN in `x` stays; one in `top` may be lost, as in the instruction.
template <typename T>
inline Vec<T> larger(const Vec<T>& x, const Vec<T>& top) {
  return at::vec::clamp_min(x, top);
}

// 2^t for the numbers a softmax has, t <= 0 up to rounding; too small a result becomes 0 or 2^-126. Relative error of
// float at most 2e-7: 2^n times a polynomial of degree 5 with p(0) = 1 and least relative error on the rest of t.
template <typename T>
inline Vec<T> exp2_softmax(const Vec<T>& t) {
  return t.exp2();
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> exp2_softmax<float>(const Vec<float>& t) {
  const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.00186713005f), r, _mm512_set1_ps(0.00901703071f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0557999127f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240164444f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693151295f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, t);  // p * 2^floor(t)
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> exp2_softmax<float>(const Vec<float>& given) {
  // Adding 1.5 * 2^23 + 127 rounds to a whole number n and leaves n + 127 in the low bits: shifted into the exponent,
  // that is 2^n. A product with it, and not a sum of bits, keeps a NaN.
  const __m256 magic = _mm256_set1_ps(12582912.0f + 127.0f);
  const __m256 t = _mm256_max_ps(_mm256_set1_ps(-126.0f), given);
  const __m256 shifted = _mm256_add_ps(t, magic);
  const __m256 r = _mm256_sub_ps(t, _mm256_sub_ps(shifted, magic));
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(0.00132647273f), r, _mm256_set1_ps(0.00967151299f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.0555073358f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.240222424f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.693147004f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}
#else
template <>
inline Vec<float> exp2_softmax<float>(const Vec<float>& given) {
  const Vec<float> t = at::vec::clamp_min(given, Vec<float>(-126.0f));
  const Vec<float> n = t.round();
  const Vec<float> r = t - n;
  Vec<float> p = at::vec::fmadd(Vec<float>(0.00132647273f), r, Vec<float>(0.00967151299f));
  p = at::vec::fmadd(p, r, Vec<float>(0.0555073358f));
  p = at::vec::fmadd(p, r, Vec<float>(0.240222424f));
  p = at::vec::fmadd(p, r, Vec<float>(0.693147004f));
  p = at::vec::fmadd(p, r, Vec<float>(1.0f));
  const Vec<float> bits = at::vec::fmadd(n, Vec<float>(8388608.0f), Vec<float>(127.0f * 8388608.0f));  // 2^n, exact
  return p * at::vec::cast<float>(at::vec::convert_to_int_of_same_size(bits));
}
#endif

// Split positive numbers into mantissa and exponent: `exponents` grows by floor(log2 x), x becomes x / 2^that. A
// logarithm of a product of many numbers then takes one logarithm at the very end.
template <typename T>
inline void split_exponent(Vec<T>& x, Vec<T>& exponents) {
  exponents = exponents + x.log2();
  x = Vec<T>(1);
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline void split_exponent<float>(Vec<float>& x, Vec<float>& exponents) {
  exponents = _mm512_add_ps(exponents, _mm512_getexp_ps(x));
  x = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline void split_exponent<float>(Vec<float>& x, Vec<float>& exponents) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i exponent = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127));
  const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);  // has no exponent, and must not become a number
  exponents = _mm256_add_ps(exponents, _mm256_blendv_ps(_mm256_cvtepi32_ps(exponent), x, is_nan));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
  x = _mm256_castsi256_ps(_mm256_or_si256(mantissa, _mm256_set1_epi32(0x3f800000)));
}
#endif

// Whether any lane is below the limit or not a number.
template <typename T>
inline bool any_below(const Vec<T>& x, T limit) {
  alignas(64) T lanes[kWidth<T>];
  x.store(lanes);
  bool all = true;
  for (int64_t i = 0; i < kWidth<T>; ++i) all = all && lanes[i] >= limit;
  return !all;
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline bool any_below<float>(const Vec<float>& x, float limit) {
  return _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NGE_UQ) != 0;
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline bool any_below<float>(const Vec<float>& x, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NGE_UQ)) != 0;
}
#endif

// Sum of the lanes, in a wider type.
template <typename T>
inline double horizontal_sum(const Vec<T>& v) {
  alignas(64) T lanes[kWidth<T>];
  v.store(lanes);
  double sum = 0;
  for (int64_t i = 0; i < kWidth<T>; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

// A vector whose lanes n, n + 4, n + 8, .. add up to the lanes of vector number n of the four.
template <typename T>
inline Vec<T> interleave_sums(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c, const Vec<T>& d) {
  alignas(64) T lanes[kWidth<T>] = {};
  const Vec<T>* of[4] = {&a, &b, &c, &d};
  for (int n = 0; n < 4; ++n) lanes[n] = static_cast<T>(horizontal_sum(*of[n]));
  return Vec<T>::loadu(lanes);
}
// The same of two, for vectors of fewer than four lanes.
template <typename T>
inline Vec<T> interleave_sums(const Vec<T>& a, const Vec<T>& b) {
  alignas(64) T lanes[kWidth<T>] = {};
  lanes[0] = static_cast<T>(horizontal_sum(a));
  lanes[1] = static_cast<T>(horizontal_sum(b));
  return Vec<T>::loadu(lanes);
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> interleave_sums<float>(const Vec<float>& a, const Vec<float>& b, const Vec<float>& c,
                                         const Vec<float>& d) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> interleave_sums<float>(const Vec<float>& a, const Vec<float>& b, const Vec<float>& c,
                                         const Vec<float>& d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}
#endif

// to[i] += sum of the lanes of v[i], for as many vectors as a vector has lanes.
template <typename T>
inline void add_lane_sums(const Vec<T> (&v)[Vec<T>::size()], T* to) {
  for (int64_t i = 0; i < kWidth<T>; ++i) to[i] += static_cast<T>(horizontal_sum(v[i]));
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline void add_lane_sums<float>(const Vec<float> (&v)[16], float* to) {
  Vec<float> quarter[4];  // [i]: four sums of v[4i .. 4i + 3] in each of the four parts of 128 bits
  for (int i = 0; i < 4; ++i) quarter[i] = interleave_sums(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  const auto halve = [](const __m512& a, const __m512& b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const __m512 sums = halve(halve(quarter[0], quarter[1]), halve(quarter[2], quarter[3]));
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline void add_lane_sums<float>(const Vec<float> (&v)[8], float* to) {
  const __m256 low = interleave_sums(v[0], v[1], v[2], v[3]), high = interleave_sums(v[4], v[5], v[6], v[7]);
  const __m256 sums = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums));
}
#endif

// Elements base[index[i]] of a vector of indices in [0, width): a permutation of one load where there is one.
template <typename T, typename Index>
inline Vec<T> pick(const T* base, const Vec<Index>& index) {
  return at::vec::gather<sizeof(T)>(base, index);
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> pick<float, int32_t>(const float* base, const Vec<int32_t>& index) {
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(base));
}
template <>
inline Vec<double> pick<double, int64_t>(const double* base, const Vec<int64_t>& index) {
  return _mm512_permutexvar_pd(index, _mm512_loadu_pd(base));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> pick<float, int32_t>(const float* base, const Vec<int32_t>& index) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(base), index);
}
#endif

// Treats subnormal numbers as zero while it lives, on this thread: they are slow, and nothing here needs them.
// Elsewhere than with AVX2 and AVX-512 it does nothing; results do not depend on it.
class FlushSubnormals {
 public:
#if defined(LOMIX_X86_VECTORS)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
