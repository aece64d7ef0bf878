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

// Number of one of four partial results; `first` where it has none yet.
template <int i, bool is_first>
struct Lane {
  static constexpr int index = i;
  static constexpr bool first = is_first;
};

// Call f(c, lane) for all classes, lane.index = c % 4 being a constant.
template <int kC, typename F>
inline LOMIX_INLINE void for_classes(int C, const F& f) {
  if constexpr (kC > 0) {
    [&]<int... c>(std::integer_sequence<int, c...>) LOMIX_INLINE { (f(c, Lane<c % 4, c / 4 == 0>()), ...); }
    (std::make_integer_sequence<int, kC>{});
  } else {
    int c = 0;
    for (; c + 4 <= C; c += 4) {
      f(c, Lane<0, false>());
      f(c + 1, Lane<1, false>());
      f(c + 2, Lane<2, false>());
      f(c + 3, Lane<3, false>());
    }
    if (c < C) f(c, Lane<0, false>());
    if (c + 1 < C) f(c + 1, Lane<1, false>());
    if (c + 2 < C) f(c + 2, Lane<2, false>());
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

// A sum, or a largest value, in four parts.
template <typename T>
class Partial {
 public:
  explicit Partial(T start) : part_{Vec<T>(start), Vec<T>(start), Vec<T>(start), Vec<T>(start)} {}
  template <typename L>
  LOMIX_INLINE void add(L, const Vec<T>& x) {
    part_[L::index] = L::first ? x : part_[L::index] + x;
  }
  template <typename L>
  LOMIX_INLINE void add_product(L, const Vec<T>& x, const Vec<T>& y) {
    part_[L::index] = L::first ? x * y : at::vec::fmadd(x, y, part_[L::index]);
  }
  template <typename L>
  LOMIX_INLINE void raise(L, const Vec<T>& x) {
    part_[L::index] = L::first ? x : larger(x, part_[L::index]);
  }
  LOMIX_INLINE Vec<T> sum() const { return (part_[0] + part_[1]) + (part_[2] + part_[3]); }
  LOMIX_INLINE Vec<T> largest() const { return larger(larger(part_[0], part_[1]), larger(part_[2], part_[3])); }

 private:
  Vec<T> part_[4];
};

// Turn the logits of one vector of pixels into exponentials relative to their largest, `top`. Returns their sum. `unit`
// is what turns the logits into units of log2, none for those that are.
template <int kC, typename T, typename... Unit>
inline LOMIX_INLINE Vec<T> exponentiate(int C, ClassValues<T, kC>& e, Vec<T>& top, const Unit&... unit) {
  Partial<T> tops(-std::numeric_limits<T>::infinity()), sum(0);
  for_classes<kC>(C, [&](int c, auto lane) LOMIX_INLINE { tops.raise(lane, e.get(c)); });
  top = tops.largest();
  for_classes<kC>(C, [&](int c, auto lane) LOMIX_INLINE {
    const Vec<T> one = exp2_softmax(((e.get(c) - top) * ... * unit));
    e.set(c, one);
    sum.add(lane, one);
  });
  return sum.sum();
}

// What a softmax needs of one vector of pixels: exponentials, and what is common to their classes. Logits and
// differences of logits are in units of log2, that is times log2(e): then the largest one's exponential is exactly 1
// without a multiplication for each.
template <typename T>
struct PixelSums {
  Vec<T> sum;     // of the exponentials
  Vec<T> margin;  // the logit they are relative to, minus that of the label's class
};

// Exponentials of one map for all pixels of the tile, to tile.map, and 1 / their sum to tile.inverse (0 where there is no
// pixel). The source, one of sources.h, makes them; `each(exists, sums)` is told what is common to each vector's classes.
// Only then do other loops use them: the way from logits to the inverse is long, and must not hold up what follows.
template <int kC, typename Source, typename T, typename Each>
inline LOMIX_INLINE void exponentiate_map(const Tile<T>& tile, Source& source, const Each& each) {
  constexpr int64_t kV = kWidth<T>;
  const int C = kC > 0 ? kC : tile.num_classes;
  const int64_t rows = tile.rows, pitch = tile.columns * kV;
  T *map = tile.map, *inverse = tile.inverse;
  const T* exists_at = tile.exists;
  for (int64_t r = 0, p = 0; r < rows; ++r) {
    source.start_row(r);
    for (int64_t v = 0; v < pitch; v += kV, p += kV) {
      ClassValues<T, kC> e(map + p);
      const PixelSums<T> sums = source.template exponentials<kC>(C, p, v, e);
      if constexpr (kC > 0) {
        for_classes<kC>(C, [&](int c, auto) LOMIX_INLINE { e.get(c).store(map + c * kTilePixels + p); });
      }
      const Vec<T> exists = Vec<T>::loadu(exists_at + p);
      (exists / sums.sum).store(inverse + p);
      each(exists, sums);
    }
  }
}

// dLoss/dmap, to [C, kTilePixels], from dLoss/dstats of this map, grad [1 + 2C], whose gQ is doubled already if squared:
//   t_c = gI_c [y == c] + 2 gQ_c s_c (or gQ_c);  d_c = s_c (t_c - sum_k s_k t_k + g_ce) - g_ce [y == c]
template <int kC, bool kSquared, typename T>
void push_gradient(const Tile<T>& tile, const T* grad, T* to) {
  constexpr int64_t kV = kWidth<T>;
  const int C = kC > 0 ? kC : tile.num_classes;
  const int64_t pixels = tile.pixels();
  const T *one_hot = tile.one_hot, *map = tile.map, *inverse_at = tile.inverse;
  const Vec<T> g_ce(grad[0]);
  const T *g_i = grad + 1, *g_q = grad + 1 + C;
  for (int64_t p = 0; p < pixels; p += kV) {
    ClassValues<T, kC> s(to + p), t(to + p);
    const Vec<T> inverse = Vec<T>::loadu(inverse_at + p);
    const auto hot = [&](int c) LOMIX_INLINE { return Vec<T>::loadu(one_hot + c * kTilePixels + p); };
    const auto t_of = [&](int c, const Vec<T>& one) LOMIX_INLINE {
      const Vec<T> q(g_q[c]);
      return at::vec::fmadd(hot(c), Vec<T>(g_i[c]), kSquared ? one * q : q);
    };
    Partial<T> dot(0);
    for_classes<kC>(C, [&](int c, auto lane) LOMIX_INLINE {
      const Vec<T> one = Vec<T>::loadu(map + c * kTilePixels + p) * inverse, slope = t_of(c, one);
      if constexpr (kC > 0) t.set(c, slope);
      s.set(c, one);
      dot.add_product(lane, one, slope);
    });
    const Vec<T> common = g_ce - dot.sum();
    for_classes<kC>(C, [&](int c, auto) LOMIX_INLINE {
      const Vec<T> one = s.get(c);
      const Vec<T> slope = kC > 0 ? t.get(c) : t_of(c, one);
      at::vec::fmsub(one, slope + common, g_ce * hot(c)).store(to + c * kTilePixels + p);
    });
  }
}

template <int kC, typename Source, typename T>
void softmax_gradient(const Tile<T>& tile, Source source, bool squared, const T* grad, T* to) {
  exponentiate_map<kC>(tile, source, [](const Vec<T>&, const PixelSums<T>&) {});
  squared ? push_gradient<kC, true>(tile, grad, to) : push_gradient<kC, false>(tile, grad, to);
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
