// Adjoints of the mixes: the gradient of one map, in tile.map, added to those of its members and parameters.
#pragma once

#include "mix.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
void unmix_add(const Tile<T>& tile, const MapSpec& spec, int C) {
  constexpr int64_t kV = Vec<T>::size();
  for (int j = 0; j < spec.num_members; ++j) {
    for (int c = 0; c < C; ++c) {
      T* to = tile.grad_scale(spec.members[j], c, C);
      const T* from = tile.map + c * tile.capacity;
      for (int64_t v = 0; v < tile.vectors * kV; v += kV)
        (Vec<T>::loadu(to + v) + Vec<T>::loadu(from + v)).store(to + v);
    }
  }
}

// dP_j = d * product of the other members: products of those before j, and, sweeping back, of those after it.
template <typename T, int kMembers>
void unmix_mul(const Tile<T>& tile, const MapSpec& spec, int C) {
  constexpr int64_t kV = Vec<T>::size();
  for (int c = 0; c < C; ++c) {
    for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
      Vec<T> value[kMembers], before[kMembers];
      before[0] = Vec<T>::loadu(tile.map + c * tile.capacity + v);
      for (int j = 0; j < kMembers; ++j) {
        value[j] = Vec<T>::loadu(tile.scale(spec.members[j], c, C) + v);
        if (j > 0) before[j] = before[j - 1] * value[j - 1];
      }
      Vec<T> after(1);
      for (int j = kMembers - 1; j >= 0; --j) {
        T* to = tile.grad_scale(spec.members[j], c, C) + v;
        at::vec::fmadd(before[j], after, Vec<T>::loadu(to)).store(to);
        after = after * value[j];
      }
    }
  }
}

template <typename T>
void unmix_cat(const Tile<T>& tile, const MapSpec& spec, int C, const T* weight, const ParameterGrads& out) {
  constexpr int64_t kV = Vec<T>::size();
  for (int c = 0; c < C; ++c) {
    Vec<T> sum(0);
    for (int64_t v = 0; v < tile.vectors * kV; v += kV) sum = sum + Vec<T>::loadu(tile.map + c * tile.capacity + v);
    out.cat_bias[spec.subset * C + c] += horizontal_sum(sum);
  }
  for (int j = 0; j < spec.num_members; ++j) {
    const int64_t matrix = static_cast<int64_t>(spec.first_pair + j) * C * C;
    const int member = spec.members[j];
    for_blocks(C, tile.vectors, [&]<int R, int N>(int row, int64_t vector) {  // dP_j[c] += sum over o of W[o, c] d[o]
      Vec<T> acc[R][N];
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) acc[r][n] = Vec<T>::loadu(tile.grad_scale(member, row + r, C) + (vector + n) * kV);
      }
      multiply_block<R, N>(weight + matrix + row, 1, C, C, tile.map + vector * kV, tile.capacity, acc);
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) acc[r][n].store(tile.grad_scale(member, row + r, C) + (vector + n) * kV);
      }
    });
    accumulate_outer(tile.map, C, tile.scale(member, 0, C), C, tile.vectors, tile.capacity, out.cat_weight + matrix);
  }
}

// tile.attention still holds the weights that the map was made with.
template <typename T>
void unmix_awf(const Tile<T>& tile, const MapSpec& spec, int C, const T* weight, const ParameterGrads& out) {
  constexpr int64_t kV = Vec<T>::size();
  // 1. gradient of the attention, through its softmax, to the scores
  for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
    Vec<T> along[kMaxScales];
    Vec<T> mean(0);
    for (int j = 0; j < spec.num_members; ++j) {
      Vec<T> dot(0);
      for (int c = 0; c < C; ++c) {
        dot = at::vec::fmadd(Vec<T>::loadu(tile.map + c * tile.capacity + v),
                             Vec<T>::loadu(tile.scale(spec.members[j], c, C) + v), dot);
      }
      along[j] = dot;
      mean = at::vec::fmadd(Vec<T>::loadu(tile.attention + j * tile.capacity + v), dot, mean);
    }
    for (int j = 0; j < spec.num_members; ++j) {
      const Vec<T> score = Vec<T>::loadu(tile.attention + j * tile.capacity + v) * (along[j] - mean);
      score.store(tile.grad_score + j * tile.capacity + v);
    }
  }
  // 2. to the members and the parameters
  for (int j = 0; j < spec.num_members; ++j) {
    const int64_t pair = spec.first_pair + j;
    const T* attention = tile.attention + j * tile.capacity;
    const T* score = tile.grad_score + j * tile.capacity;
    for (int c = 0; c < C; ++c) {
      const Vec<T> u(weight[pair * C + c]);
      const T* value = tile.scale(spec.members[j], c, C);
      const T* grad = tile.map + c * tile.capacity;
      T* to = tile.grad_scale(spec.members[j], c, C);
      Vec<T> sum(0);
      for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
        const Vec<T> d_score = Vec<T>::loadu(score + v);
        const Vec<T> direct =
            at::vec::fmadd(Vec<T>::loadu(attention + v), Vec<T>::loadu(grad + v), Vec<T>::loadu(to + v));
        at::vec::fmadd(d_score, u, direct).store(to + v);
        sum = at::vec::fmadd(d_score, Vec<T>::loadu(value + v), sum);
      }
      out.awf_weight[pair * C + c] += horizontal_sum(sum);
    }
    Vec<T> sum(0);
    for (int64_t v = 0; v < tile.vectors * kV; v += kV) sum = sum + Vec<T>::loadu(score + v);
    out.awf_bias[pair] += horizontal_sum(sum);
  }
}

template <typename T>
void unmix(const Problem<T>& problem, const Tile<T>& tile, const MapSpec& spec, int C, const ParameterGrads& out) {
  switch (spec.op) {
    case Operator::kOrig:
    case Operator::kAdd: return unmix_add(tile, spec, C);
    case Operator::kMul:
      switch (spec.num_members) {
        case 2: return unmix_mul<T, 2>(tile, spec, C);
        case 3: return unmix_mul<T, 3>(tile, spec, C);
        case 4: return unmix_mul<T, 4>(tile, spec, C);
        case 5: return unmix_mul<T, 5>(tile, spec, C);
        default: return unmix_mul<T, 6>(tile, spec, C);
      }
    case Operator::kCat: return unmix_cat(tile, spec, C, problem.cat_weight, out);
    case Operator::kAwf: return unmix_awf(tile, spec, C, problem.awf_weight, out);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
