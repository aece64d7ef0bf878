// The four mixes of a tile: what they make of a subset of scales, as input of a softmax.
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
    default: return f.template operator()<6>();
  }
}

// Below this a product of exponentials may have lost digits that matter: a factor that underflowed was less than
// 2^-126, so what it would have added is less than 2^-26 of a sum that is at least this.
template <typename T>
inline constexpr T kLeastSum = sizeof(T) == 4 ? T(7.888609052210118e-31) : T(1e-290);  // 2^-100

// E_l, its sum and its margin, of one scale.
template <typename T>
MapInput<T> exponentiate_scale(const Tile<T>& tile, int64_t l) {
  constexpr int64_t kV = kWidth<T>;
  const int C = tile.num_classes;
  T *margin_at = tile.margins + l * kTilePixels, *sum_at = tile.sums + l * kTilePixels;
  for (int64_t p = 0; p < tile.pixels(); p += kV) {
    ClassValues<T, 0> e(tile.exponential(l) + p);
    Vec<T> top;
    exponentiate<0>(tile.scale(l) + p, C, e, top, Vec<T>(kLog2E<T>)).store(sum_at + p);
    ((top - Vec<T>::loadu(tile.own + l * kTilePixels + p)) * Vec<T>(kLog2E<T>)).store(margin_at + p);
  }
  return {tile.exponential(l), nullptr, margin_at, sum_at};
}

// add: exp of a sum is the product of the exponentials, so none is computed here, except where scales contradict each
// other so strongly that every class underflows.
template <typename T, int kSize>
MapInput<T> make_add(const Tile<T>& tile, const Subset& subset) {
  constexpr int64_t kV = kWidth<T>;
  const int C = tile.num_classes;
  const T* e[kSize];
  for (int j = 0; j < kSize; ++j) e[j] = tile.exponential(subset.members[j]);
  for (int64_t p = 0; p < tile.pixels(); p += kV) {
    Partial<T> sum(0);
    for_classes<0>(C, [&](int c, auto lane) {
      Vec<T> product = Vec<T>::loadu(e[0] + c * kTilePixels + p);
      repeat<kSize - 1>(0, [&](int j) { product = product * Vec<T>::loadu(e[j + 1] + c * kTilePixels + p); });
      product.store(tile.map + c * kTilePixels + p);
      sum.part[lane] = sum.part[lane] + product;
    });
    Vec<T> total = sum.sum(), margin(0);
    for (int j = 0; j < kSize; ++j) {
      margin = margin + Vec<T>::loadu(tile.margins + subset.members[j] * kTilePixels + p);
    }
    if (__builtin_expect(any_below(total, kLeastSum<T>), 0)) {
      Vec<T> own(0), top;
      for (int c = 0; c < C; ++c) {
        Vec<T> logit(0);
        for (int j = 0; j < kSize; ++j) {
          logit = logit + Vec<T>::loadu(tile.scale(subset.members[j]) + c * kTilePixels + p);
        }
        logit.store(tile.map + c * kTilePixels + p);
        own = at::vec::fmadd(logit, Vec<T>::loadu(tile.one_hot + c * kTilePixels + p), own);
      }
      ClassValues<T, 0> values(tile.map + p);
      total = exponentiate<0>(tile.map + p, C, values, top, Vec<T>(kLog2E<T>));
      margin = (top - own) * Vec<T>(kLog2E<T>);
    }
    total.store(tile.map_sum + p);
    margin.store(tile.map_margin + p);
  }
  return {tile.map, nullptr, tile.map_margin, tile.map_sum};
}

template <typename T, int kSize>
MapInput<T> make_mul(const Tile<T>& tile, const Subset& subset) {
  constexpr int64_t kV = kWidth<T>;
  const T *value[kSize], *own[kSize];
  for (int j = 0; j < kSize; ++j) {
    value[j] = tile.scale(subset.members[j]);
    own[j] = tile.own + subset.members[j] * kTilePixels;
  }
  const auto multiply_row = [&](const T* const(&from)[kSize], int64_t at, T* to) {
    for (int64_t p = 0; p < tile.pixels(); p += kV) {
      Vec<T> product = Vec<T>(kLog2E<T>) * Vec<T>::loadu(from[0] + at + p);
      repeat<kSize - 1>(0, [&](int j) { product = product * Vec<T>::loadu(from[j + 1] + at + p); });
      product.store(to + p);
    }
  };
  for (int c = 0; c < tile.num_classes; ++c) multiply_row(value, c * kTilePixels, tile.map + c * kTilePixels);
  multiply_row(own, 0, tile.map_own);
  return {tile.map, tile.map_own, nullptr, nullptr};
}

// f(j, blend, row, weight) for the one or two enlarged rows that make row r of member j.
template <typename T, int kSize, typename F>
inline void for_blended(const Tile<T>& tile, const Subset& subset, int64_t r, const F& f) {
  repeat<kSize>(0, [&](int j) {
    const RowBlend<T>& blend = tile.blend(subset.members[j], r);
    f(j, blend.lo_slot, blend.lo_weight);
    if (!blend.single) f(j, blend.hi_slot, blend.hi_weight);
  });
}

// cat: b plus the members' projections, which were made at native resolution and in units of log2, as the biases are.
template <typename T, int kSize, typename Rows>
MapInput<T> make_cat(const Tile<T>& tile, const Subset& subset, const T* bias, PerScale<Rows>& rows) {
  constexpr int64_t kV = kWidth<T>;
  const int C = tile.num_classes;
  const T* b = bias + static_cast<int64_t>(subset.index) * C;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* from[2 * kSize];
    Vec<T> weight[2 * kSize];
    int count = 0;
    for_blended<T, kSize>(tile, subset, r, [&](int j, int64_t slot, T w) {
      from[count] = rows[subset.members[j]].projected(slot, tile.index) + subset.cat_row[j] * kTileWidth;
      weight[count++] = Vec<T>(w);
    });
    for (int64_t v = 0; v < tile.columns * kV; v += kV) {
      const int64_t p = r * tile.columns * kV + v;
      Vec<T> own(0);
      for (int c = 0; c < C; ++c) {
        Vec<T> value(b[c]);
        for (int i = 0; i < count; ++i) {
          value = at::vec::fmadd(weight[i], Vec<T>::loadu(from[i] + c * kTileWidth + v), value);
        }
        value.store(tile.map + c * kTilePixels + p);
        own = at::vec::fmadd(value, Vec<T>::loadu(tile.one_hot + c * kTilePixels + p), own);
      }
      own.store(tile.map_own + p);
    }
  }
  return {tile.map, tile.map_own, nullptr, nullptr};
}

// awf: attention = softmax over the members of their scores u . P + v, projected like cat; stored in tile.attention.
template <typename T, int kSize, typename Rows>
MapInput<T> make_awf(const Tile<T>& tile, const Subset& subset, const T* bias, PerScale<Rows>& rows) {
  constexpr int64_t kV = kWidth<T>;
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t v = 0; v < tile.columns * kV; v += kV) {
      const int64_t p = r * tile.columns * kV + v;
      Vec<T> score[kSize];
      repeat<kSize>(0, [&](int j) { score[j] = Vec<T>(bias[subset.first_pair + j]); });
      for_blended<T, kSize>(tile, subset, r, [&](int j, int64_t slot, T w) {
        const T* from = rows[subset.members[j]].projected(slot, tile.index) + subset.awf_row[j] * kTileWidth + v;
        score[j] = at::vec::fmadd(Vec<T>(w), Vec<T>::loadu(from), score[j]);
      });
      Vec<T> top = score[0], sum(0), own(0);
      repeat<kSize - 1>(0, [&](int j) { top = larger(score[j + 1], top); });
      repeat<kSize>(0, [&](int j) {
        score[j] = exp2_softmax(score[j] - top);
        sum = sum + score[j];
      });
      const Vec<T> inverse = Vec<T>(1) / sum;
      repeat<kSize>(0, [&](int j) {
        score[j] = score[j] * inverse;
        score[j].store(tile.attention + j * kTilePixels + p);
        score[j] = score[j] * Vec<T>(kLog2E<T>);
        own = at::vec::fmadd(score[j], Vec<T>::loadu(tile.own + subset.members[j] * kTilePixels + p), own);
      });
      own.store(tile.map_own + p);
      for (int c = 0; c < tile.num_classes; ++c) {
        Vec<T> value(0);
        repeat<kSize>(0, [&](int j) {
          value = at::vec::fmadd(score[j], Vec<T>::loadu(tile.scale(subset.members[j]) + c * kTilePixels + p), value);
        });
        value.store(tile.map + c * kTilePixels + p);
      }
    }
  }
  return {tile.map, tile.map_own, nullptr, nullptr};
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
