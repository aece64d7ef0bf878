// Adjoints of the mixes: gradients of the maps of one subset, added to those of its members.
#pragma once

#include "mix.h"
#include "row_grads.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// dLoss/dmap of the maps of one subset, each [C, kTilePixels] or null, and what they give to its members.
template <typename T>
struct SubsetGrads {
  T *add, *mul, *awf, *cat;
  T* scores;  // [K, kTilePixels], gradient of the attention scores
  T* scales;  // dP [L, C, kTilePixels]
};

// add, mul and awf at once, so that each member's gradient is read and written once:
//   dP_j += d_add + d_mul * product of the other members (kBounded: of their factors, * slope_j) + attention_j d_awf
//   dscore_j = attention_j (d_awf . P_j - sum over k of attention_k d_awf . P_k)
// The part of dP_j that comes through the scores goes by way of the projection, as that of cat does.
template <typename T, int kSize, bool kBounded>
void unmix_members(const Tile<T>& tile, const Subset& subset, const SubsetGrads<T> grads) {
  constexpr int64_t kV = kWidth<T>;
  const int64_t C = tile.num_classes, pixels = tile.pixels();
  const T* const attention_at = tile.attention;
  T* const scores = grads.awf == nullptr ? nullptr : grads.scores + subset.first_pair * kTilePixels;
  const T *value[kSize], *factor[kSize];
  const int64_t to_slope = tile.slope - tile.factor;  // 0 without
  T* to[kSize];
  for (int j = 0; j < kSize; ++j) {
    value[j] = tile.scale(subset.members[j]);
    factor[j] = tile.multiplier(subset.members[j]);
    to[j] = grads.scales + subset.members[j] * C * kTilePixels;
  }
  for (int64_t p = 0; p < pixels; p += kV) {
    Vec<T> attention[kSize], along[kSize];
    repeat<kSize>([&](int j) LOMIX_INLINE {
      attention[j] = grads.awf == nullptr ? Vec<T>(0) : Vec<T>::loadu(attention_at + j * kTilePixels + p);
      along[j] = Vec<T>(0);
    });
    for (int64_t at = p; at < C * kTilePixels; at += kTilePixels) {
      Vec<T> sum[kSize], member[kSize];
      repeat<kSize>([&](int j) LOMIX_INLINE {
        sum[j] = Vec<T>::loadu(to[j] + at);
        member[j] = Vec<T>::loadu(value[j] + at);
      });
      if (grads.add != nullptr) {
        const Vec<T> d = Vec<T>::loadu(grads.add + at);
        repeat<kSize>([&](int j) LOMIX_INLINE { sum[j] = sum[j] + d; });
      }
      if (grads.mul != nullptr) {
        Vec<T> before[kSize];  // d_mul and the factors before j
        before[0] = Vec<T>::loadu(grads.mul + at);
        const auto of = [&](int j) LOMIX_INLINE { return kBounded ? Vec<T>::loadu(factor[j] + at) : member[j]; };
        repeat<kSize - 1>([&](int j) LOMIX_INLINE { before[j + 1] = before[j] * of(j); });
        const auto add = [&](int j, const Vec<T>& d) LOMIX_INLINE {
          sum[j] = kBounded ? at::vec::fmadd(d, Vec<T>::loadu(factor[j] + to_slope + at), sum[j]) : sum[j] + d;
        };
        Vec<T> after = of(kSize - 1);
        add(kSize - 1, before[kSize - 1]);
        repeat<kSize - 1>([&](int i) LOMIX_INLINE {
          const int j = kSize - 2 - i;
          if constexpr (kBounded) {
            add(j, before[j] * after);
          } else {
            sum[j] = at::vec::fmadd(before[j], after, sum[j]);
          }
          if (j > 0) after = after * of(j);
        });
      }
      if (grads.awf != nullptr) {
        const Vec<T> d = Vec<T>::loadu(grads.awf + at);
        repeat<kSize>([&](int j) LOMIX_INLINE {
          sum[j] = at::vec::fmadd(attention[j], d, sum[j]);
          along[j] = at::vec::fmadd(d, member[j], along[j]);
        });
      }
      repeat<kSize>([&](int j) LOMIX_INLINE { sum[j].store(to[j] + at); });
    }
    if (grads.awf == nullptr) continue;
    Vec<T> mean(0);
    repeat<kSize>([&](int j) LOMIX_INLINE { mean = at::vec::fmadd(attention[j], along[j], mean); });
    repeat<kSize>([&](int j) LOMIX_INLINE { (attention[j] * (along[j] - mean)).store(scores + j * kTilePixels + p); });
  }
}

template <typename T>
void unmix_subset(const Tile<T>& tile, const Subset& subset, const SubsetGrads<T>& grads) {
  with_size(subset.size, [&]<int kSize>() {
    tile.factor == nullptr ? unmix_members<T, kSize, false>(tile, subset, grads)
                           : unmix_members<T, kSize, true>(tile, subset, grads);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
