// The maps of a tile. Each leaves the logits of one map in tile.map, in units of log2, with the largest of each pixel;
// but the sum of scales leaves exponentials, with their sums, inverses and margins.
#pragma once

#include "softmax.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Call f.template operator()<size>() with the size of a subset as a constant.
template <typename F>
inline void with_size(int size, const F& f) {
  switch (size) {
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

// Both passes make the same maps; only the forward pass of plain problems needs to know the logit of the label, for the
// margins. In other problems margins are made with the exponentials.
// kBare is for sigmoids, which need no largest logit either.
enum class Pass { kForward, kBackward, kBare };

// tile.map = value(p, at) for every pixel p and class, `at` being their place in an array [C, ..]; tile.top the largest
// of each pixel's, tile.margin that minus own(p). All in units of log2.
template <Pass kPass, typename T, typename Value, typename Own>
inline LOMIX_INLINE void make_logits(const Tile<T>& tile, const Value& value, const Own& own) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t end = tile.num_classes * kTilePixels;
  T *map = tile.map, *top_at = tile.top, *margin = tile.margin;
  for_blocks<T>(tile.pixels(), [&]<int N>(int64_t p) LOMIX_INLINE {
    Vec<T> top[N];
    repeat<N>([&](int n) LOMIX_INLINE {
      top[n] = value(p + n * kV, p + n * kV);
      top[n].store(map + p + n * kV);
    });
    for (int64_t at = p + kTilePixels; at < end; at += kTilePixels) {
      repeat<N>([&](int n) LOMIX_INLINE {
        const Vec<T> x = value(p + n * kV, at + n * kV);
        x.store(map + at + n * kV);
        if constexpr (kPass != Pass::kBare) top[n] = larger(x, top[n]);
      });
    }
    if constexpr (kPass == Pass::kBare) return;
    repeat<N>([&](int n) LOMIX_INLINE {
      top[n].store(top_at + p + n * kV);
      if constexpr (kPass == Pass::kForward) (top[n] - own(p + n * kV)).store(margin + p + n * kV);
    });
  });
}

// Exponentials of one scale and their margin: what all sums of scales are made of. Returns the tile with the scale's
// own map in it.
template <Kind kKind, Pass kPass, typename T>
Tile<T> exponentiate_scale(const Tile<T>& tile, int64_t l) {
  constexpr Pass kOwn = kKind == Kind::kPlain ? kPass : Pass::kBackward;
  const Vec<T> unit(kLog2E<T>);
  const T *from = tile.scale(l), *own = tile.own + l * kTilePixels;
  Tile<T> here = tile;
  here.map = tile.exponential(l);
  here.margin = tile.margins + l * kTilePixels;
  make_logits<kOwn>(
      here, [&](int64_t, int64_t at) LOMIX_INLINE { return unit * Vec<T>::loadu(from + at); },
      [&](int64_t p) LOMIX_INLINE { return unit * Vec<T>::loadu(own + p); });
  exponentiate<kKind == Kind::kSoftmax && kPass == Pass::kForward>(here);
  return here;
}

// Below this a product of exponentials may have lost digits that matter: a factor that underflowed was less than
// 2^-126, so what that class would have added is less than 2^-26 of a sum that is at least this.
template <typename T>
inline constexpr T kLeastSum = sizeof(T) == 4 ? T(7.888609052210118e-31) : T(1e-290);  // 2^-100

// Where scales contradict each other so strongly that every class underflows: one vector of the sum by its logits.
template <typename T>
__attribute__((noinline)) void add_logits(const Tile<T>& tile, const int* members, int size, int64_t p) {
  const Vec<T> unit(kLog2E<T>);
  const int64_t end = tile.num_classes * kTilePixels;
  Vec<T> top(-std::numeric_limits<T>::infinity()), own(0), sum(0), margin(0);
  for (int64_t at = p; at < end; at += kTilePixels) {
    Vec<T> logit(0);
    for (int j = 0; j < size; ++j) logit = logit + Vec<T>::loadu(tile.scale(members[j]) + at);
    logit = logit * unit;
    logit.store(tile.map + at);
    top = larger(logit, top);
    own = Vec<T>::blendv(own, logit, Vec<T>::loadu(tile.one_hot + at) > Vec<T>(0));
  }
  for (int64_t at = p; at < end; at += kTilePixels) {
    const Vec<T> power = Vec<T>::loadu(tile.map + at) - top, e = exp2_softmax(power);
    e.store(tile.map + at);
    sum = sum + e;
    if (tile.share != nullptr) margin = margin - shared(Vec<T>::loadu(tile.share + at), power);
  }
  sum.store(tile.sum + p);
  (tile.share != nullptr ? margin : top - own).store(tile.margin + p);
}

// The sum of scales. exp of a sum is the product of the exponentials, so none is computed here.
template <Pass kPass, int kSize, typename T>
void make_add(const Tile<T>& tile, const int* members) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t end = tile.num_classes * kTilePixels;
  const T *e[kSize], *margins[kSize];
  for (int j = 0; j < kSize; ++j) {
    e[j] = tile.exponential(members[j]);
    margins[j] = tile.margins + members[j] * kTilePixels;
  }
  T *map = tile.map, *sum_at = tile.sum, *margin_at = tile.margin, *inverse_at = tile.inverse;
  const T* exists = tile.exists;
  for_blocks<T>(tile.pixels(), [&]<int N>(int64_t p) LOMIX_INLINE {
    Vec<T> sum[N];
    repeat<N>([&](int n) LOMIX_INLINE { sum[n] = Vec<T>(0); });
    for (int64_t at = p; at < end; at += kTilePixels) {
      repeat<N>([&](int n) LOMIX_INLINE {
        Vec<T> product = Vec<T>::loadu(e[0] + at + n * kV);
        repeat<kSize - 1>([&](int j) LOMIX_INLINE { product = product * Vec<T>::loadu(e[j + 1] + at + n * kV); });
        product.store(map + at + n * kV);
        sum[n] = sum[n] + product;
      });
    }
    repeat<N>([&](int n) LOMIX_INLINE {
      const int64_t at = p + n * kV;
      sum[n].store(sum_at + at);
      if constexpr (kPass == Pass::kForward) {
        Vec<T> margin = Vec<T>::loadu(margins[0] + at);
        repeat<kSize - 1>([&](int j) LOMIX_INLINE { margin = margin + Vec<T>::loadu(margins[j + 1] + at); });
        margin.store(margin_at + at);
      }
      if (__builtin_expect(any_below(sum[n], kLeastSum<T>), 0)) add_logits(tile, members, kSize, at);
      (Vec<T>::loadu(exists + at) / Vec<T>::loadu(sum_at + at)).store(inverse_at + at);
    });
  });
}

template <Pass kPass, typename T>
void make_add(const Tile<T>& tile, const int* members, int size) {
  with_size(size, [&]<int kSize>() { make_add<kPass, kSize>(tile, members); });
}

template <Pass kPass, typename T>
void make_mul(const Tile<T>& tile, const Subset& subset) {
  with_size(subset.size, [&]<int kSize>() {
    const Vec<T> unit(kLog2E<T>);
    const T *value[kSize], *own[kSize];
    for (int j = 0; j < kSize; ++j) {
      value[j] = tile.multiplier(subset.members[j]);
      own[j] = tile.own + subset.members[j] * kTilePixels;
    }
    const auto product = [&](const T* const* of, int64_t at) LOMIX_INLINE {
      Vec<T> x = unit * Vec<T>::loadu(of[0] + at);
      repeat<kSize - 1>([&](int j) LOMIX_INLINE { x = x * Vec<T>::loadu(of[j + 1] + at); });
      return x;
    };
    make_logits<kPass>(
        tile, [&](int64_t, int64_t at) LOMIX_INLINE { return product(value, at); },
        [&](int64_t p) LOMIX_INLINE { return product(own, p); });
  });
}

// Enlarged native rows that the members' output row r is blended from, and with which weights. Row j of `lo` and `hi`
// begins with row rows_of[j] of the projection of member j.
template <int kSize, typename T>
struct BlendedRows {
  const T *lo[kSize], *hi[kSize];
  Vec<T> lo_weight[kSize], hi_weight[kSize];

  template <typename Rows>
  BlendedRows(const Tile<T>& tile, const Subset& subset, const int* rows_of, PerScale<Rows>& rows, int64_t r) {
    for (int j = 0; j < kSize; ++j) {
      const RowBlend<T>& blend = tile.blend(subset.members[j], r);
      const Rows& of = rows[subset.members[j]];
      lo[j] = of.projected(blend.lo_slot, tile.index) + rows_of[j] * kTileWidth;
      hi[j] = of.projected(blend.hi_slot, tile.index) + rows_of[j] * kTileWidth;
      lo_weight[j] = Vec<T>(blend.lo_weight);
      hi_weight[j] = Vec<T>(blend.hi_weight);
    }
  }
  LOMIX_INLINE Vec<T> add(int j, int64_t at, const Vec<T>& to) const {
    return at::vec::fmadd(hi_weight[j], Vec<T>::loadu(hi[j] + at),
                          at::vec::fmadd(lo_weight[j], Vec<T>::loadu(lo[j] + at), to));
  }
};

// One output row of cat, N vectors wide.
template <Pass kPass, int kSize, int N, typename T>
inline LOMIX_INLINE void make_cat_row(const Tile<T>& tile, const BlendedRows<kSize, T>& rows, const T* bias, int64_t v,
                                      int64_t p) {
  constexpr int64_t kV = kWidth<T>;
  const int C = tile.num_classes;
  const T* one_hot = tile.one_hot;
  T* map = tile.map;
  Vec<T> top[N], own[N];
  repeat<N>([&](int n) LOMIX_INLINE {
    top[n] = Vec<T>(-std::numeric_limits<T>::infinity());
    own[n] = Vec<T>(0);
  });
  int64_t at = p, row = v;
  for (int c = 0; c < C; ++c, at += kTilePixels, row += kTileWidth) {
    Vec<T> x[N];
    repeat<N>([&](int n) LOMIX_INLINE { x[n] = Vec<T>(bias[c]); });
    repeat<kSize>([&](int j)
                      LOMIX_INLINE { repeat<N>([&](int n) LOMIX_INLINE { x[n] = rows.add(j, row + n * kV, x[n]); }); });
    repeat<N>([&](int n) LOMIX_INLINE {
      x[n].store(map + at + n * kV);
      if constexpr (kPass != Pass::kBare) top[n] = larger(x[n], top[n]);
      if constexpr (kPass == Pass::kForward) {
        own[n] = at::vec::fmadd(x[n], Vec<T>::loadu(one_hot + at + n * kV), own[n]);
      }
    });
  }
  if constexpr (kPass == Pass::kBare) return;
  repeat<N>([&](int n) LOMIX_INLINE {
    top[n].store(tile.top + p + n * kV);
    if constexpr (kPass == Pass::kForward) (top[n] - own[n]).store(tile.margin + p + n * kV);
  });
}

// cat: b plus the members' projections, which were made at native resolution and in units of log2, as the biases are.
template <Pass kPass, typename T, typename Rows>
void make_cat(const Tile<T>& tile, const Subset& subset, const T* bias, PerScale<Rows>& rows) {
  constexpr int64_t kV = kWidth<T>;
  const T* b = bias + static_cast<int64_t>(subset.index) * tile.num_classes;
  with_size(subset.size, [&]<int kSize>() {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const BlendedRows<kSize, T> blended(tile, subset, subset.cat_row, rows, r);
      const int64_t p = r * tile.columns * kV;
      int64_t v = 0;
      for (; v + 2 <= tile.columns; v += 2) make_cat_row<kPass, kSize, 2>(tile, blended, b, v * kV, p + v * kV);
      if (v < tile.columns) make_cat_row<kPass, kSize, 1>(tile, blended, b, v * kV, p + v * kV);
    }
  });
}

// tile.attention = softmax over the members of their scores u . P + v, projected like cat; then the members so
// weighted.
template <Pass kPass, typename T, typename Rows>
void make_awf(const Tile<T>& tile, const Subset& subset, const T* bias, PerScale<Rows>& rows) {
  constexpr int64_t kV = kWidth<T>;
  with_size(subset.size, [&]<int kSize>() {
    const Vec<T> unit(kLog2E<T>);
    const int64_t pitch = tile.columns * kV;
    Vec<T> start[kSize];
    repeat<kSize>([&](int j) LOMIX_INLINE { start[j] = Vec<T>(bias[subset.first_pair + j]); });
    for (int64_t r = 0; r < tile.rows; ++r) {
      const BlendedRows<kSize, T> blended(tile, subset, subset.awf_row, rows, r);
      T* at = tile.attention + r * pitch;
      for (int64_t v = 0; v < pitch; v += kV, at += kV) {
        Vec<T> score[kSize], top, sum;
        repeat<kSize>([&](int j) LOMIX_INLINE {
          score[j] = blended.add(j, v, start[j]);
          top = j == 0 ? score[j] : larger(score[j], top);
        });
        repeat<kSize>([&](int j) LOMIX_INLINE {
          score[j] = exp2_softmax(score[j] - top);
          sum = j == 0 ? score[j] : sum + score[j];
        });
        const Vec<T> inverse = Vec<T>(1) / sum;
        repeat<kSize>([&](int j) LOMIX_INLINE {
          const Vec<T> attention = score[j] * inverse;
          attention.store(at + j * kTilePixels);
          (attention * unit).store(at + (kSize + j) * kTilePixels);
        });
      }
    }
    const T *value[kSize], *own[kSize];
    for (int j = 0; j < kSize; ++j) {
      value[j] = tile.scale(subset.members[j]);
      own[j] = tile.own + subset.members[j] * kTilePixels;
    }
    const T* attention = tile.attention + kSize * kTilePixels;  // times log2(e)
    const auto weighted = [&](const T* const* of, int64_t p, int64_t at) LOMIX_INLINE {
      Vec<T> x = Vec<T>::loadu(attention + p) * Vec<T>::loadu(of[0] + at);
      repeat<kSize - 1>([&](int j) LOMIX_INLINE {
        x = at::vec::fmadd(Vec<T>::loadu(attention + (j + 1) * kTilePixels + p), Vec<T>::loadu(of[j + 1] + at), x);
      });
      return x;
    };
    make_logits<kPass>(
        tile, [&](int64_t p, int64_t at) LOMIX_INLINE { return weighted(value, p, at); },
        [&](int64_t p) LOMIX_INLINE { return weighted(own, p, p); });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
