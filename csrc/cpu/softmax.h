// Softmax of one map over a tile: its sums forward, its gradient backward.
//
// kC is the number of classes where it is a common one, so that a pixel's classes stay in registers; 0 means any
// number, by the same steps on the tile's buffer. Four partial sums run side by side: one chain of dependent additions
// would be slower than the exponentials.
#pragma once

#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// One vector of pixels of every class: in registers, or, for kC = 0, in a buffer [C, kTilePixels].
template <typename T, int kC>
class ClassValues {
 public:
  explicit ClassValues(T*) {}
  Vec<T> get(int c) const { return values_[c]; }
  void set(int c, const Vec<T>& value) { values_[c] = value; }

 private:
  Vec<T> values_[kC];
};
template <typename T>
class ClassValues<T, 0> {
 public:
  explicit ClassValues(T* at) : at_(at) {}
  Vec<T> get(int c) const { return Vec<T>::loadu(at_ + c * kTilePixels); }
  void set(int c, const Vec<T>& value) { value.store(at_ + c * kTilePixels); }

 private:
  T* at_;
};

template <int i>
using Lane = std::integral_constant<int, i>;

// Call f(c, lane) for all classes with lane = c % 4, a constant.
template <int kC, typename F>
inline __attribute__((always_inline)) void for_classes(int C, const F& f) {
  if constexpr (kC > 0) {
    [&]<int... c>(std::integer_sequence<int, c...>) __attribute__((always_inline)) { (f(c, Lane<c % 4>()), ...); }
    (std::make_integer_sequence<int, kC>{});
  } else {
    int c = 0;
    for (; c + 4 <= C; c += 4) {
      f(c, Lane<0>());
      f(c + 1, Lane<1>());
      f(c + 2, Lane<2>());
      f(c + 3, Lane<3>());
    }
    if (c < C) f(c, Lane<0>());
    if (c + 1 < C) f(c + 1, Lane<1>());
    if (c + 2 < C) f(c + 2, Lane<2>());
  }
}

// Call f.template operator()<kC>() with the class count as a constant where it is a common one and worth the code, else
// with 0.
template <typename T, typename F>
inline void with_class_count([[maybe_unused]] int64_t num_classes, const F& f) {
#if defined(LOMIX_X86_VECTORS)
  if constexpr (sizeof(T) == 4) {
    switch (num_classes) {
      case 2: return f.template operator()<2>();
      case 3: return f.template operator()<3>();
      case 4: return f.template operator()<4>();
      case 5: return f.template operator()<5>();
      case 6: return f.template operator()<6>();
      case 7: return f.template operator()<7>();
      case 8: return f.template operator()<8>();
      case 9: return f.template operator()<9>();
      case 10: return f.template operator()<10>();
      case 12: return f.template operator()<12>();
      case 14: return f.template operator()<14>();
      case 16: return f.template operator()<16>();
      default: break;
    }
  }
#endif
  return f.template operator()<0>();
}

template <typename T>
struct Partial {
  Vec<T> part[4];
  explicit Partial(T start) : part{Vec<T>(start), Vec<T>(start), Vec<T>(start), Vec<T>(start)} {}
  Vec<T> sum() const { return (part[0] + part[1]) + (part[2] + part[3]); }
  Vec<T> largest() const { return larger(larger(part[0], part[1]), larger(part[2], part[3])); }
};

enum class From { kLogits, kExponentials };

// What a softmax starts from: logits, or the exponentials of logits relative to the largest of a pixel and their sum.
// Logits and differences of logits are in units of log2, that is times log2(e): then the largest one's exponential is
// exactly 1 without a multiplication for each. `map` [C, kTilePixels], the others [kTilePixels].
template <typename T>
struct MapInput {
  const T* map;
  const T* own;     // logits: that of the label's class
  const T* margin;  // exponentials: largest - own
  const T* sum;     // exponentials: over the classes
};

// Exponentials of one vector of pixels, relative to their largest logit, `top`. Returns their sum. `unit` is what turns
// the logits into units of log2, 1 for those that are.
template <int kC, typename T, typename Unit = Lane<1>>
inline Vec<T> exponentiate(const T* map, int C, ClassValues<T, kC>& e, Vec<T>& top, const Unit& unit = {}) {
  const auto load = [&](int c) { return Vec<T>::loadu(map + c * kTilePixels); };
  Partial<T> tops(-std::numeric_limits<T>::infinity()), sum(0);
  for_classes<kC>(C, [&](int c, auto lane) { tops.part[lane] = larger(load(c), tops.part[lane]); });
  top = tops.largest();
  for_classes<kC>(C, [&](int c, auto lane) {
    Vec<T> t = load(c) - top;
    if constexpr (!std::is_same_v<Unit, Lane<1>>) t = t * unit;
    const Vec<T> one = exp2_softmax(t);
    e.set(c, one);
    sum.part[lane] = sum.part[lane] + one;
  });
  return sum.sum();
}

// Sums of one map over the pixels of this thread, as vectors: lanes are added up when they are drained.
template <typename T>
struct MapSums {
  static int64_t size(int64_t C) { return (3 + 2 * C) * kWidth<T>; }
  T* at;  // margins in units of log2, log2 of sums, product of mantissas, I [C], Q [C], each a vector

  void clear(int64_t C) const {
    std::memset(at, 0, sizeof(T) * size(C));
    Vec<T>(1).store(at + 2 * kWidth<T>);
  }
  void drain(int64_t C, double* stats) const {
    constexpr int64_t kV = kWidth<T>;
    const Vec<T> margin = Vec<T>::loadu(at), logs = Vec<T>::loadu(at + kV), product = Vec<T>::loadu(at + 2 * kV);
    constexpr double kLn2 = 0.69314718055994530942;
    stats[0] += kLn2 * (horizontal_sum(margin) + horizontal_sum(logs) + horizontal_sum(product.log2()));
    for (int64_t k = 0; k < 2 * C; ++k) stats[1 + k] += horizontal_sum(Vec<T>::loadu(at + (3 + k) * kV));
    clear(C);
  }
};

// Add the statistics of one map over the tile.
template <int kC, From kFrom, typename T>
void add_statistics(const Tile<T>& tile, const MapInput<T>& in, bool squared, const MapSums<T>& out) {
  constexpr int64_t kV = kWidth<T>;
  const int C = kC > 0 ? kC : tile.num_classes;
  T* const i_at = out.at + 3 * kV;
  T* const q_at = i_at + C * kV;
  Vec<T> margin = Vec<T>::loadu(out.at), logs = Vec<T>::loadu(out.at + kV), product = Vec<T>::loadu(out.at + 2 * kV);
  // For kC > 0 the sums of all classes live in registers (or on the stack) during the loop, else in memory.
  Vec<T> held[kC > 0 ? 2 * kC : 1];
  if constexpr (kC > 0) repeat<2 * kC>(0, [&](int k) { held[k] = Vec<T>::loadu(i_at + k * kV); });
  const auto add_class = [&](int c, const Vec<T>& s, const Vec<T>& hot, auto with_square) {
    const auto denominator = [&](const Vec<T>& before) {
      if constexpr (with_square) return at::vec::fmadd(s, s, before);
      return before + s;
    };
    if constexpr (kC > 0) {
      held[c] = at::vec::fmadd(s, hot, held[c]);
      held[kC + c] = denominator(held[kC + c]);
    } else {
      T *i = i_at + c * kV, *q = q_at + c * kV;
      at::vec::fmadd(s, hot, Vec<T>::loadu(i)).store(i);
      denominator(Vec<T>::loadu(q)).store(q);
    }
  };
  for (int64_t p = 0; p < tile.pixels(); p += kV) {
    ClassValues<T, kC> e(tile.map + p);
    Vec<T> rest, sum;
    if constexpr (kFrom == From::kLogits) {
      Vec<T> top;
      sum = exponentiate<kC>(in.map + p, C, e, top);
      rest = top - Vec<T>::loadu(in.own + p);
    } else {
      rest = Vec<T>::loadu(in.margin + p);
      sum = Vec<T>::loadu(in.sum + p);
    }
    const Vec<T> exists = Vec<T>::loadu(tile.exists + p), inverse = exists / sum;
    const auto add_all = [&](auto with_square) {
      for_classes<kC>(C, [&](int c, auto) {
        const Vec<T> one = kFrom == From::kLogits ? e.get(c) : Vec<T>::loadu(in.map + c * kTilePixels + p);
        add_class(c, one * inverse, Vec<T>::loadu(tile.one_hot + c * kTilePixels + p), with_square);
      });
    };
    squared ? add_all(std::true_type()) : add_all(std::false_type());
    margin = at::vec::fmadd(exists, rest, margin);
    product = product * at::vec::fmadd(exists, sum, Vec<T>(1) - exists);
    if (kFrom == From::kExponentials || p % (8 * kV) == 7 * kV) split_exponent(product, logs);
  }
  split_exponent(product, logs);
  margin.store(out.at);
  logs.store(out.at + kV);
  product.store(out.at + 2 * kV);
  if constexpr (kC > 0) repeat<2 * kC>(0, [&](int k) { held[k].store(i_at + k * kV); });
}

// dLoss/dmap [C, kTilePixels] from dLoss/dstats of this map, grad [1 + 2C], whose gQ is doubled already if squared:
//   t_c = gI_c [y == c] + 2 gQ_c s_c (or gQ_c);  d_c = s_c (t_c - sum_k s_k t_k + g_ce) - g_ce [y == c]
// `to` may be in.map.
template <int kC, From kFrom, typename T>
void softmax_gradient(const Tile<T>& tile, const MapInput<T>& in, bool squared, const T* grad, T* to) {
  constexpr int64_t kV = kWidth<T>;
  const int C = kC > 0 ? kC : tile.num_classes;
  const Vec<T> g_ce(grad[0]);
  const T *g_i = grad + 1, *g_q = grad + 1 + C;
  for (int64_t p = 0; p < tile.pixels(); p += kV) {
    ClassValues<T, kC> s(to + p), t(to + p);
    Vec<T> sum;
    if constexpr (kFrom == From::kLogits) {
      Vec<T> top;
      sum = exponentiate<kC>(in.map + p, C, s, top);
    } else {
      sum = Vec<T>::loadu(in.sum + p);
    }
    const Vec<T> exists = Vec<T>::loadu(tile.exists + p), inverse = exists / sum;
    const auto hot = [&](int c) { return Vec<T>::loadu(tile.one_hot + c * kTilePixels + p); };
    const auto differentiate = [&](auto with_square) {
      const auto t_of = [&](int c, const Vec<T>& one) {
        if constexpr (with_square) return at::vec::fmadd(hot(c), Vec<T>(g_i[c]), one * Vec<T>(g_q[c]));
        return at::vec::fmadd(hot(c), Vec<T>(g_i[c]), Vec<T>(g_q[c]));
      };
      Partial<T> dot(0);
      for_classes<kC>(C, [&](int c, auto lane) {
        const Vec<T> e = kFrom == From::kLogits ? s.get(c) : Vec<T>::loadu(in.map + c * kTilePixels + p);
        const Vec<T> one = e * inverse, slope = t_of(c, one);
        if constexpr (kC > 0) t.set(c, slope);
        s.set(c, one);
        dot.part[lane] = at::vec::fmadd(one, slope, dot.part[lane]);
      });
      const Vec<T> common = g_ce - dot.sum();
      for_classes<kC>(C, [&](int c, auto) {
        const Vec<T> one = s.get(c);
        const Vec<T> slope = kC > 0 ? t.get(c) : t_of(c, one);
        at::vec::fmsub(one, slope + common, g_ce * hot(c)).store(to + c * kTilePixels + p);
      });
    };
    squared ? differentiate(std::true_type()) : differentiate(std::false_type());
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
