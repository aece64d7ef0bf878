// The four mixes on a tile, and their adjoints. Every buffer is [.., capacity], pixels fastest.
#pragma once

#include "exponential.h"
#include "tile.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
double horizontal_sum(const Vec<T>& v) {
  alignas(64) T lanes[Vec<T>::size()];
  v.store(lanes);
  double sum = 0;
  for (int i = 0; i < Vec<T>::size(); ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
template <>
inline double horizontal_sum<float>(const Vec<float>& v) {
  const auto add = [](const Vec<float>& x, const Vec<float>& y) { return x + y; };
  return at::vec::VecReduceAllSIMD<float, decltype(add)>::apply(add, v);
}
#endif

// Call f.template operator()<R, N>(row, vector) over blocks of 3 rows by 4 vectors and what is left at the edges: 12
// accumulators, 4 inputs and a factor fill the 16 registers of AVX2.
template <typename F>
void for_blocks(int rows, int64_t vectors, const F& f) {
  int r = 0;
  const auto along = [&]<int R>(int row) {
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4) f.template operator()<R, 4>(row, v);
    for (; v < vectors; ++v) f.template operator()<R, 1>(row, v);
  };
  for (; r + 3 <= rows; r += 3) along.template operator()<3>(r);
  if (rows - r == 2) along.template operator()<2>(r);
  if (rows - r == 1) along.template operator()<1>(r);
}

// acc[r][n] += sum over k < inner of a[r * row_stride + k * inner_stride] * x[k * capacity + vector n]
template <int R, int N, typename T>
void multiply_block(const T* a, int64_t row_stride, int64_t inner_stride, int inner, const T* x, int64_t capacity,
                    Vec<T> (&acc)[R][N]) {
  constexpr int64_t kV = Vec<T>::size();
  for (int k = 0; k < inner; ++k) {
    Vec<T> in[N];
    for (int n = 0; n < N; ++n) in[n] = Vec<T>::loadu(x + k * capacity + n * kV);
    for (int r = 0; r < R; ++r) {
      const Vec<T> factor(a[r * row_stride + k * inner_stride]);
      for (int n = 0; n < N; ++n) acc[r][n] = at::vec::fmadd(factor, in[n], acc[r][n]);
    }
  }
}

// d[row, column] += sum over pixels of x[row] * y[column], both [.., capacity], into a matrix of doubles.
template <typename T>
void accumulate_outer(const T* x, int rows, const T* y, int columns, int64_t vectors, int64_t capacity, double* d) {
  constexpr int64_t kV = Vec<T>::size();
  const auto block = [&]<int R, int S>(int r, int c) {
    Vec<T> acc[R][S];
    for (int i = 0; i < R; ++i) {
      for (int j = 0; j < S; ++j) acc[i][j] = Vec<T>(0);
    }
    for (int64_t v = 0; v < vectors * kV; v += kV) {
      Vec<T> left[R];
      for (int i = 0; i < R; ++i) left[i] = Vec<T>::loadu(x + (r + i) * capacity + v);
      for (int j = 0; j < S; ++j) {
        const Vec<T> right = Vec<T>::loadu(y + (c + j) * capacity + v);
        for (int i = 0; i < R; ++i) acc[i][j] = at::vec::fmadd(left[i], right, acc[i][j]);
      }
    }
    for (int i = 0; i < R; ++i) {
      for (int j = 0; j < S; ++j) d[(r + i) * columns + c + j] += horizontal_sum(acc[i][j]);
    }
  };
  int r = 0;
  for (; r + 3 <= rows; r += 3) {
    int c = 0;
    for (; c + 3 <= columns; c += 3) block.template operator()<3, 3>(r, c);
    for (; c < columns; ++c) block.template operator()<3, 1>(r, c);
  }
  for (; r < rows; ++r) {
    int c = 0;
    for (; c + 3 <= columns; c += 3) block.template operator()<1, 3>(r, c);
    for (; c < columns; ++c) block.template operator()<1, 1>(r, c);
  }
}

template <typename T>
void mix_add(const Tile<T>& tile, const MapSpec& spec, int C) {
  constexpr int64_t kV = Vec<T>::size();
  for (int c = 0; c < C; ++c) {
    for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
      Vec<T> sum = Vec<T>::loadu(tile.scale(spec.members[0], c, C) + v);
      for (int j = 1; j < spec.num_members; ++j) sum = sum + Vec<T>::loadu(tile.scale(spec.members[j], c, C) + v);
      sum.store(tile.map + c * tile.capacity + v);
    }
  }
}

template <typename T>
void mix_mul(const Tile<T>& tile, const MapSpec& spec, int C) {
  constexpr int64_t kV = Vec<T>::size();
  for (int c = 0; c < C; ++c) {
    for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
      Vec<T> product = Vec<T>::loadu(tile.scale(spec.members[0], c, C) + v);
      for (int j = 1; j < spec.num_members; ++j)
        product = product * Vec<T>::loadu(tile.scale(spec.members[j], c, C) + v);
      product.store(tile.map + c * tile.capacity + v);
    }
  }
}

// map[o] = b[o] + sum over members j and classes c of W_j[o, c] P_j[c]
template <typename T>
void mix_cat(const Tile<T>& tile, const MapSpec& spec, int C, const T* weight, const T* bias) {
  constexpr int64_t kV = Vec<T>::size();
  const T* b = bias + static_cast<int64_t>(spec.subset) * C;
  for_blocks(C, tile.vectors, [&]<int R, int N>(int row, int64_t vector) {
    Vec<T> acc[R][N];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) acc[r][n] = Vec<T>(b[row + r]);
    }
    for (int j = 0; j < spec.num_members; ++j) {
      const T* w = weight + (static_cast<int64_t>(spec.first_pair + j) * C + row) * C;
      multiply_block<R, N>(w, C, 1, C, tile.scale(spec.members[j], 0, C) + vector * kV, tile.capacity, acc);
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) acc[r][n].store(tile.map + (row + r) * tile.capacity + (vector + n) * kV);
    }
  });
}

// attention[j] = softmax over members of u_j . P_j + v_j
template <typename T>
void attend(const Tile<T>& tile, const MapSpec& spec, int C, const T* weight, const T* bias) {
  constexpr int64_t kV = Vec<T>::size();
  for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
    Vec<T> score[kMaxScales];
    Vec<T> top(-std::numeric_limits<T>::infinity());
    for (int j = 0; j < spec.num_members; ++j) {
      const int64_t pair = spec.first_pair + j;
      Vec<T> even(bias[pair]), odd(0);  // two chains, so that the additions overlap
      int c = 0;
      for (; c + 2 <= C; c += 2) {
        even = at::vec::fmadd(Vec<T>(weight[pair * C + c]), Vec<T>::loadu(tile.scale(spec.members[j], c, C) + v), even);
        odd = at::vec::fmadd(Vec<T>(weight[pair * C + c + 1]), Vec<T>::loadu(tile.scale(spec.members[j], c + 1, C) + v),
                             odd);
      }
      if (c < C) {
        even = at::vec::fmadd(Vec<T>(weight[pair * C + c]), Vec<T>::loadu(tile.scale(spec.members[j], c, C) + v), even);
      }
      score[j] = even + odd;
      top = at::vec::maximum(top, score[j]);
    }
    Vec<T> sum(0);
    for (int j = 0; j < spec.num_members; ++j) {
      score[j] = exp_nonpositive<T>(score[j] - top);
      sum = sum + score[j];
    }
    const Vec<T> inverse = Vec<T>(1) / sum;
    for (int j = 0; j < spec.num_members; ++j) (score[j] * inverse).store(tile.attention + j * tile.capacity + v);
  }
}

template <typename T>
void mix_awf(const Tile<T>& tile, const MapSpec& spec, int C, const T* weight, const T* bias) {
  constexpr int64_t kV = Vec<T>::size();
  attend(tile, spec, C, weight, bias);
  for (int c = 0; c < C; ++c) {
    for (int64_t v = 0; v < tile.vectors * kV; v += kV) {
      Vec<T> sum(0);
      for (int j = 0; j < spec.num_members; ++j) {
        sum = at::vec::fmadd(Vec<T>::loadu(tile.attention + j * tile.capacity + v),
                             Vec<T>::loadu(tile.scale(spec.members[j], c, C) + v), sum);
      }
      sum.store(tile.map + c * tile.capacity + v);
    }
  }
}

// Make one map of the tile and return where it lies, [C, capacity]: an original stays where it is.
template <typename T>
const T* make_map(const Problem<T>& problem, const Tile<T>& tile, const MapSpec& spec, int C) {
  switch (spec.op) {
    case Operator::kOrig: return tile.scale(spec.members[0], 0, C);
    case Operator::kAdd: mix_add(tile, spec, C); break;
    case Operator::kMul: mix_mul(tile, spec, C); break;
    case Operator::kCat: mix_cat(tile, spec, C, problem.cat_weight, problem.cat_bias); break;
    case Operator::kAwf: mix_awf(tile, spec, C, problem.awf_weight, problem.awf_bias); break;
  }
  return tile.map;
}

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
