// The maps of a tile as sources of a softmax: each makes the exponentials of one vector of pixels in registers.
//
// A source has start_row(r), called before the pixels of output row r of the tile, and exponentials(C, p, v, e) for the
// vector of pixels p of the tile, which lies v pixels into its row.
#pragma once

#include "softmax.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// e[c] = first(c), then e[c] = next(i, c, e[c]) for all i < count.
template <int kC, typename T, typename First, typename Next>
inline LOMIX_INLINE void fold(int C, ClassValues<T, kC>& e, int count, const First& first, const Next& next) {
  if constexpr (kC > 0) {
    for_classes<kC>(C, [&](int c, auto) LOMIX_INLINE { e.set(c, first(c)); });
    for (int i = 0; i < count; ++i) {
      const auto step = next(i);
      for_classes<kC>(C, [&](int c, auto) LOMIX_INLINE { e.set(c, step(c, e.get(c))); });
    }
  } else {
    for (int c = 0; c < C; ++c) {
      Vec<T> value = first(c);
      for (int i = 0; i < count; ++i) value = next(i)(c, value);
      e.set(c, value);
    }
  }
}

// Below this a product of exponentials may have lost digits that matter: a factor that underflowed was less than
// 2^-126, so what it would have added is less than 2^-26 of a sum that is at least this.
template <typename T>
inline constexpr T kLeastSum = sizeof(T) == 4 ? T(7.888609052210118e-31) : T(1e-290);  // 2^-100

// Exponentials of one scale and their margin, for all pixels of the tile: what sums of scales are made of.
template <int kC, typename T>
void exponentiate_scale(const Tile<T>& tile, int64_t l) {
  constexpr int64_t kV = kWidth<T>;
  const int C = kC > 0 ? kC : tile.num_classes;
  const int64_t pixels = tile.pixels();
  const T *from = tile.scale(l), *own = tile.own + l * kTilePixels;
  T *to = tile.exponential(l), *margin = tile.margins + l * kTilePixels;
  for (int64_t p = 0; p < pixels; p += kV) {
    ClassValues<T, kC> e(to + p);
    for_classes<kC>(C, [&](int c, auto) LOMIX_INLINE { e.set(c, Vec<T>::loadu(from + c * kTilePixels + p)); });
    Vec<T> top;
    exponentiate<kC>(C, e, top, Vec<T>(kLog2E<T>));
    if constexpr (kC > 0) {
      for_classes<kC>(C, [&](int c, auto) LOMIX_INLINE { e.get(c).store(to + c * kTilePixels + p); });
    }
    ((top - Vec<T>::loadu(own + p)) * Vec<T>(kLog2E<T>)).store(margin + p);
  }
}

// The sum of scales, or one alone. exp of a sum is the product of the exponentials, so none is computed here, except
// where scales contradict each other so strongly that every class underflows.
template <typename T>
class AddSource {
 public:
  static constexpr bool kSmallSums = true;
  AddSource(const Tile<T>& tile, const int* members, int count) : count_(count), one_hot_(tile.one_hot) {
    for (int j = 0; j < count; ++j) {
      scale_[j] = tile.scale(members[j]);
      exponential_[j] = tile.exponential(members[j]);
      margin_[j] = tile.margins + members[j] * kTilePixels;
    }
  }
  void start_row(int64_t) {}

  template <int kC>
  LOMIX_INLINE PixelSums<T> exponentials(int C, int64_t p, int64_t, ClassValues<T, kC>& e) const {
    const auto at = [&](const T* const* from, int j) LOMIX_INLINE {
      return [&, base = from[j] + p](int c) LOMIX_INLINE { return Vec<T>::loadu(base + c * kTilePixels); };
    };
    fold<kC>(C, e, count_ - 1, at(exponential_, 0), [&](int i) LOMIX_INLINE {
      return [factor = at(exponential_, i + 1)](int c, const Vec<T>& x) LOMIX_INLINE { return x * factor(c); };
    });
    Partial<T> sum(0);
    for_classes<kC>(C, [&](int c, auto lane) LOMIX_INLINE { sum.add(lane, e.get(c)); });
    PixelSums<T> sums{sum.sum(), Vec<T>::loadu(margin_[0] + p)};
    for (int j = 1; j < count_; ++j) sums.margin = sums.margin + Vec<T>::loadu(margin_[j] + p);
    if (__builtin_expect(any_below(sums.sum, kLeastSum<T>), 0)) {
      Vec<T> own(0), top;
      fold<kC>(C, e, count_ - 1, at(scale_, 0), [&](int i) LOMIX_INLINE {
        return [term = at(scale_, i + 1)](int c, const Vec<T>& x) LOMIX_INLINE { return x + term(c); };
      });
      for_classes<kC>(C, [&](int c, auto) LOMIX_INLINE {
        own = at::vec::fmadd(e.get(c), Vec<T>::loadu(one_hot_ + c * kTilePixels + p), own);
      });
      sums.sum = exponentiate<kC>(C, e, top, Vec<T>(kLog2E<T>));
      sums.margin = (top - own) * Vec<T>(kLog2E<T>);
    }
    return sums;
  }

 private:
  int count_;
  const T* one_hot_;
  const T *scale_[kMaxScales], *exponential_[kMaxScales], *margin_[kMaxScales];
};

template <typename T>
class MulSource {
 public:
  static constexpr bool kSmallSums = false;
  MulSource(const Tile<T>& tile, const Subset& subset) : count_(subset.size) {
    for (int j = 0; j < count_; ++j) {
      scale_[j] = tile.scale(subset.members[j]);
      own_[j] = tile.own + subset.members[j] * kTilePixels;
    }
  }
  void start_row(int64_t) {}

  template <int kC>
  LOMIX_INLINE PixelSums<T> exponentials(int C, int64_t p, int64_t, ClassValues<T, kC>& e) const {
    const Vec<T> unit(kLog2E<T>);
    const T* first = scale_[0] + p;
    fold<kC>(
        C, e, count_ - 1, [&](int c) LOMIX_INLINE { return unit * Vec<T>::loadu(first + c * kTilePixels); },
        [&](int i) LOMIX_INLINE {
          return [factor = scale_[i + 1] + p](int c, const Vec<T>& x)
                     LOMIX_INLINE { return x * Vec<T>::loadu(factor + c * kTilePixels); };
        });
    Vec<T> own = unit * Vec<T>::loadu(own_[0] + p), top;
    for (int j = 1; j < count_; ++j) own = own * Vec<T>::loadu(own_[j] + p);
    const Vec<T> sum = exponentiate<kC>(C, e, top);
    return {sum, top - own};
  }

 private:
  int count_;
  const T *scale_[kMaxScales], *own_[kMaxScales];
};

// The one or two enlarged rows that each member is blended from in output row r: f(member number, slot, weight).
template <typename T, typename F>
inline LOMIX_INLINE void for_blended(const Tile<T>& tile, const Subset& subset, int64_t r, const F& f) {
  for (int j = 0; j < subset.size; ++j) {
    const RowBlend<T>& blend = tile.blend(subset.members[j], r);
    f(j, blend.lo_slot, blend.lo_weight);
    if (!blend.single) f(j, blend.hi_slot, blend.hi_weight);
  }
}

// cat: b plus the members' projections, which were made at native resolution and in units of log2, as the biases are.
template <typename T, typename Rows>
class CatSource {
 public:
  static constexpr bool kSmallSums = false;
  CatSource(const Tile<T>& tile, const Subset& subset, const T* bias, PerScale<Rows>& rows)
      : tile_(tile), subset_(subset), bias_(bias + static_cast<int64_t>(subset.index) * tile.num_classes), rows_(rows) {}

  void start_row(int64_t r) {
    count_ = 0;
    for_blended(tile_, subset_, r, [&](int j, int64_t slot, T weight) {
      from_[count_] =
          rows_[subset_.members[j]].projected(slot, tile_.index) + subset_.cat_row[j] * kTileWidth;
      weight_[count_++] = weight;
    });
  }

  template <int kC>
  LOMIX_INLINE PixelSums<T> exponentials(int C, int64_t p, int64_t v, ClassValues<T, kC>& e) const {
    const T *bias = bias_, *one_hot = tile_.one_hot + p;
    fold<kC>(
        C, e, count_, [&](int c) LOMIX_INLINE { return Vec<T>(bias[c]); },
        [&](int i) LOMIX_INLINE {
          return [from = from_[i] + v, weight = Vec<T>(weight_[i])](int c, const Vec<T>& x) LOMIX_INLINE {
            return at::vec::fmadd(weight, Vec<T>::loadu(from + c * kTileWidth), x);
          };
        });
    Partial<T> own(0);
    for_classes<kC>(C, [&](int c, auto lane) LOMIX_INLINE {
      own.add_product(lane, e.get(c), Vec<T>::loadu(one_hot + c * kTilePixels));
    });
    Vec<T> top;
    const Vec<T> sum = exponentiate<kC>(C, e, top);
    return {sum, top - own.sum()};
  }

 private:
  const Tile<T>& tile_;
  const Subset& subset_;
  const T* bias_;
  PerScale<Rows>& rows_;
  int count_ = 0;
  const T* from_[2 * kMaxScales];
  T weight_[2 * kMaxScales];
};

// tile.attention = softmax over the members of their scores u . P + v, projected like cat.
template <int kSize, typename T, typename Rows>
void attend_members(const Tile<T>& tile, const Subset& subset, const T* bias, PerScale<Rows>& rows) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t pitch = tile.columns * kV, num_rows = tile.rows;
  Vec<T> start[kSize];
  repeat<kSize>(0, [&](int j) LOMIX_INLINE { start[j] = Vec<T>(bias[subset.first_pair + j]); });
  for (int64_t r = 0; r < num_rows; ++r) {
    const T *lo[kSize], *hi[kSize];
    Vec<T> lo_weight[kSize], hi_weight[kSize];
    repeat<kSize>(0, [&](int j) LOMIX_INLINE {
      const RowBlend<T>& blend = tile.blend(subset.members[j], r);
      const Rows& of = rows[subset.members[j]];
      lo[j] = of.projected(blend.lo_slot, tile.index) + subset.awf_row[j] * kTileWidth;
      hi[j] = of.projected(blend.hi_slot, tile.index) + subset.awf_row[j] * kTileWidth;
      lo_weight[j] = Vec<T>(blend.lo_weight);
      hi_weight[j] = Vec<T>(blend.hi_weight);
    });
    T* at = tile.attention + r * pitch;
    for (int64_t v = 0; v < pitch; v += kV, at += kV) {
      Vec<T> score[kSize], top, sum;
      repeat<kSize>(0, [&](int j) LOMIX_INLINE {
        score[j] = at::vec::fmadd(lo_weight[j], Vec<T>::loadu(lo[j] + v), start[j]);
        score[j] = at::vec::fmadd(hi_weight[j], Vec<T>::loadu(hi[j] + v), score[j]);
        top = j == 0 ? score[j] : larger(score[j], top);
      });
      repeat<kSize>(0, [&](int j) LOMIX_INLINE {
        score[j] = exp2_softmax(score[j] - top);
        sum = j == 0 ? score[j] : sum + score[j];
      });
      const Vec<T> inverse = Vec<T>(1) / sum;
      repeat<kSize>(0, [&](int j) LOMIX_INLINE { (score[j] * inverse).store(at + j * kTilePixels); });
    }
  }
}

// Call f.template operator()<size>() with the size of a subset as a constant.
template <typename F>
inline void with_size(int size, const F& f) {
  switch (size) {
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    default: return f.template operator()<6>();
  }
}

template <typename T, typename Rows>
void attend(const Tile<T>& tile, const Subset& subset, const T* bias, PerScale<Rows>& rows) {
  with_size(subset.size, [&]<int kSize>() { attend_members<kSize>(tile, subset, bias, rows); });
}

// awf: the members weighted by tile.attention.
template <typename T>
class AwfSource {
 public:
  static constexpr bool kSmallSums = false;
  AwfSource(const Tile<T>& tile, const Subset& subset) : count_(subset.size), attention_(tile.attention) {
    for (int j = 0; j < count_; ++j) {
      scale_[j] = tile.scale(subset.members[j]);
      own_[j] = tile.own + subset.members[j] * kTilePixels;
    }
  }
  void start_row(int64_t) {}

  template <int kC>
  LOMIX_INLINE PixelSums<T> exponentials(int C, int64_t p, int64_t, ClassValues<T, kC>& e) const {
    const auto weight = [&](int j) LOMIX_INLINE {
      return Vec<T>(kLog2E<T>) * Vec<T>::loadu(attention_ + j * kTilePixels + p);
    };
    const Vec<T> first_weight = weight(0);
    const T* first = scale_[0] + p;
    fold<kC>(
        C, e, count_ - 1, [&](int c) LOMIX_INLINE { return first_weight * Vec<T>::loadu(first + c * kTilePixels); },
        [&](int i) LOMIX_INLINE {
          return [from = scale_[i + 1] + p, w = weight(i + 1)](int c, const Vec<T>& x) LOMIX_INLINE {
            return at::vec::fmadd(w, Vec<T>::loadu(from + c * kTilePixels), x);
          };
        });
    Vec<T> own = first_weight * Vec<T>::loadu(own_[0] + p), top;
    for (int j = 1; j < count_; ++j) own = at::vec::fmadd(weight(j), Vec<T>::loadu(own_[j] + p), own);
    const Vec<T> sum = exponentiate<kC>(C, e, top);
    return {sum, top - own};
  }

 private:
  int count_;
  const T* attention_;
  const T *scale_[kMaxScales], *own_[kMaxScales];
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
