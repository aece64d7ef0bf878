// Small matrix products whose long side is pixels: a few dozen rows of a row of pixels.
#pragma once

#include "simd.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Vectors of pixels a block of accumulators spans: with 4 rows of them, inputs and a factor, as many as registers hold.
template <typename T>
inline constexpr int kBlockVectors = sizeof(Vec<T>) == 64 ? 4 : 2;

// out[r] (+)= sum over k < inner of a[r * row_stride + k * inner_stride] * x[k * x_pitch], for R rows and N vectors.
template <int R, int N, bool kAdd, typename T>
inline void multiply_block(const T* a, int64_t row_stride, int64_t inner_stride, int64_t inner, const T* x,
                           int64_t x_pitch, T* out, int64_t out_pitch) {
  constexpr int64_t kV = kWidth<T>;
  Vec<T> acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) acc[r][n] = kAdd ? Vec<T>::loadu(out + r * out_pitch + n * kV) : Vec<T>(0);
  }
  for (int64_t k = 0; k < inner; ++k) {
    Vec<T> in[N];
    for (int n = 0; n < N; ++n) in[n] = Vec<T>::loadu(x + k * x_pitch + n * kV);
    for (int r = 0; r < R; ++r) {
      const Vec<T> factor(a[r * row_stride + k * inner_stride]);
      for (int n = 0; n < N; ++n) acc[r][n] = at::vec::fmadd(factor, in[n], acc[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) acc[r][n].store(out + r * out_pitch + n * kV);
  }
}

// The same for any number of rows and vectors. a [rows, inner] by its strides, x [inner, x_pitch], out [rows,
// out_pitch].
template <bool kAdd, typename T>
void multiply(const T* a, int64_t rows, int64_t row_stride, int64_t inner_stride, int64_t inner, const T* x,
              int64_t x_pitch, int64_t vectors, T* out, int64_t out_pitch) {
  constexpr int64_t kV = kWidth<T>;
  const auto along = [&]<int R>(int64_t r) {
    const auto at = [&]<int N>(int64_t v) {
      multiply_block<R, N, kAdd>(a + r * row_stride, row_stride, inner_stride, inner, x + v * kV, x_pitch,
                                 out + r * out_pitch + v * kV, out_pitch);
    };
    int64_t v = 0;
    for (; v + kBlockVectors<T> <= vectors; v += kBlockVectors<T>) at.template operator()<kBlockVectors<T>>(v);
    for (; v + 2 <= vectors; v += 2) at.template operator()<2>(v);
    for (; v < vectors; ++v) at.template operator()<1>(v);
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) along.template operator()<4>(r);
  for (; r + 2 <= rows; r += 2) along.template operator()<2>(r);
  for (; r < rows; ++r) along.template operator()<1>(r);
}

// Accumulators of d[row, column] = sum over pixels of g[row] * z[column], by blocks of 4 rows and kColumns columns
// whose lanes are summed all at once. Floats: each is the sum of a bounded number of parts, see RowGrads.
template <typename T>
struct OuterSums {
  static constexpr int64_t kRows = kWidth<T> < 4 ? kWidth<T> : 4;  // `rows`, a multiple of 4, is one of it too
  static constexpr int64_t kColumns = kWidth<T> / kRows;

  int64_t rows, columns;  // padded to whole blocks
  T* sums;                // [rows / kRows, columns / kColumns, kRows, kColumns]

  static int64_t padded(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }

  // Add the products over `vectors` vectors in each of `tiles`. g [tiles, rows, pitch]; z[column] points to the pixels
  // of that column in the first tile, and z_step[column] is the way to the next tile.
  void add(const T* g, int64_t pitch, int64_t tiles, int64_t vectors, const T* const* z, const int64_t* z_step) const {
    constexpr int64_t kV = kWidth<T>;
    T* to = sums;
    for (int64_t r = 0; r < rows; r += kRows) {
      for (int64_t c = 0; c < columns; c += kColumns, to += kV) {
        Vec<T> acc[kV];
        for (int64_t i = 0; i < kV; ++i) acc[i] = Vec<T>(0);
        for (int64_t t = 0; t < tiles; ++t) {
          const T* left = g + (t * rows + r) * pitch;
          for (int64_t v = 0; v < vectors * kV; v += kV) {
            Vec<T> right[kColumns];
            for (int64_t j = 0; j < kColumns; ++j) right[j] = Vec<T>::loadu(z[c + j] + t * z_step[c + j] + v);
            for (int64_t i = 0; i < kRows; ++i) {
              const Vec<T> one = Vec<T>::loadu(left + i * pitch + v);
              for (int64_t j = 0; j < kColumns; ++j) {
                acc[i * kColumns + j] = at::vec::fmadd(one, right[j], acc[i * kColumns + j]);
              }
            }
          }
        }
        add_lane_sums(acc, to);
      }
    }
  }

  // Add everything to d [real_rows, real_columns] in doubles, and begin anew.
  void drain(int64_t real_rows, int64_t real_columns, double* d) const {
    const T* from = sums;
    for (int64_t r = 0; r < rows; r += kRows) {
      for (int64_t c = 0; c < columns; c += kColumns, from += kWidth<T>) {
        for (int64_t i = 0; i < kRows && r + i < real_rows; ++i) {
          for (int64_t j = 0; j < kColumns && c + j < real_columns; ++j) {
            d[(r + i) * real_columns + c + j] += static_cast<double>(from[i * kColumns + j]);
          }
        }
      }
    }
    std::memset(sums, 0, sizeof(T) * rows * columns);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
