// Where a tile lies in the image, its axis tables, and its staging: logits interpolated once, labels read once.
//
// A tile's pixels are numbered z, y, x, the last fastest, and fall into strips of S. Rows of numbers of a tile lie as
// [strips][L][C][S]: a class is a fixed distance from the next, whatever the size of the tile.
#pragma once

#include "../types.h"
#include "call.h"
#include "numbers.cuh"

namespace lomix::cuda {

constexpr int kBad = -1;      // a label that is no class
constexpr int kOutside = -2;  // a pixel past the border of the image

struct Place {
  int z, y, x;
};

// One tile of one sample.
struct Tile {
  int64_t sample;
  int number;    // among the tiles of the sample
  Place origin;  // first output pixel
};

template <typename T>
__device__ __forceinline__ Tile tile_at(const Call<T>& call, int item, int number) {
  const Tiling& tiling = call.tiling;
  const int rest = number / tiling.tiles[2];
  return {item / tiling.chunks,
          number,
          {rest / tiling.tiles[1] << tiling.log_size[0], rest % tiling.tiles[1] << tiling.log_size[1],
           number % tiling.tiles[2] << tiling.log_size[2]}};
}

// Offset of pixel p from the first of its tile.
__device__ __forceinline__ Place offset_of(const Tiling& tiling, int p) {
  const int sx = tiling.log_size[2], sy = tiling.log_size[1];
  return {p >> (sx + sy), p >> sx & ((1 << sy) - 1), p & ((1 << sx) - 1)};
}

template <typename T>
__device__ __forceinline__ bool is_inside(const Call<T>& call, const Tile& tile, Place at) {
  return tile.origin.z + at.z < call.full[0] && tile.origin.y + at.y < call.full[1] &&
         tile.origin.x + at.x < call.full[2];
}

// Interpolation along each axis of a tile, for each scale: [L][z, y, x of the tile].
template <typename T>
struct AxisTables {
  T* weight;   // of the upper neighbour
  int* low;    // native coordinate of the lower one
  int length;  // of one scale

  __device__ __forceinline__ int begin(const Tiling& tiling, int scale, int axis) const {
    const int z = 1 << tiling.log_size[0], y = 1 << tiling.log_size[1];
    return scale * length + (axis > 0 ? z : 0) + (axis > 1 ? y : 0);
  }
};

__device__ __forceinline__ int axis_length(const Tiling& tiling) {
  return (1 << tiling.log_size[0]) + (1 << tiling.log_size[1]) + (1 << tiling.log_size[2]);
}

// Fill the tables; all threads of the block. Coordinates past the border repeat the last one.
template <typename T>
__device__ void fill_axes(const Call<T>& call, const Tile& tile, const AxisTables<T>& axes) {
  const int sizes[3] = {1 << call.tiling.log_size[0], 1 << call.tiling.log_size[1], 1 << call.tiling.log_size[2]};
  for (int e = threadIdx.x; e < axes.length * call.num_scales; e += blockDim.x) {
    const int scale = e / axes.length;
    int k = e % axes.length, axis = 0, first = tile.origin.z;
    if (k >= sizes[0]) {
      k -= sizes[0], axis = 1, first = tile.origin.y;
      if (k >= sizes[1]) k -= sizes[1], axis = 2, first = tile.origin.x;
    }
    const int out = min(first + k, call.full[axis] - 1);
    const auto from = source<T, int64_t>(out, call.full[axis], call.scales[scale].size[axis]);
    axes.low[e] = static_cast<int>(from.low);
    axes.weight[e] = from.weight;
  }
}

// Class of one pixel, kBad when it is none. Types narrower than int64 cannot overflow the comparison either. Those that
// a general call leaves out are as if they lay outside.
template <bool kGeneral, typename T>
__device__ __forceinline__ int label_at(const Call<T>& call, int64_t sample, int z, int y, int x) {
  const int64_t at =
      sample * call.label_stride[0] + z * call.label_stride[1] + y * call.label_stride[2] + x * call.label_stride[3];
  int64_t label;
  switch (static_cast<LabelType>(call.label_type)) {
    case LabelType::kUInt8: label = static_cast<const uint8_t*>(call.labels)[at]; break;
    case LabelType::kInt8: label = static_cast<const int8_t*>(call.labels)[at]; break;
    case LabelType::kInt16: label = static_cast<const int16_t*>(call.labels)[at]; break;
    case LabelType::kInt32: label = static_cast<const int32_t*>(call.labels)[at]; break;
    default: label = static_cast<const int64_t*>(call.labels)[at];
  }
  if constexpr (kGeneral) {
    if (call.target.has_ignored && label == call.target.ignore_index) return kOutside;
  }
  return label >= 0 && label < call.num_classes ? static_cast<int>(label) : kBad;
}

// NaN for a sample with a label that is no class, otherwise 0.
template <typename T>
__device__ __forceinline__ T poison_of(const Call<T>& call, int64_t sample) {
  return call.bad[sample] != 0 ? static_cast<T>(NAN) : T(0);
}

// Label of pixel p of a tile.
template <typename T>
__device__ __forceinline__ int tile_label(const Call<T>& call, const Tile& tile, int p) {
  const Place at = offset_of(call.tiling, p);
  if (!is_inside(call, tile, at)) return kOutside;
  return label_at<false>(call, tile.sample, tile.origin.z + at.z, tile.origin.y + at.y, tile.origin.x + at.x);
}

// The two native neighbours of a pixel along an axis, and their weights. What has no weight is not read, be it
// infinite: in its place the other is read twice, with weights of a half.
template <typename T>
struct Neighbours {
  int low, high;
  T low_weight, high_weight;
  __device__ __forceinline__ Neighbours(int at, T weight)
      : low(at),
        high(weight == T(0) ? at : at + 1),
        low_weight(weight == T(0) ? T(0.5) : T(1) - weight),
        high_weight(weight == T(0) ? T(0.5) : weight) {}
  // Not low + weight (high - low), which is NaN where both are the same infinity.
  __device__ __forceinline__ T blend(T from_low, T from_high) const {
    return fused(high_weight, from_high, low_weight * from_low);
  }
};

// Bilinear interpolation in one plane, of two rows there.
template <typename T, typename From>
__device__ __forceinline__ T in_plane(const From* low, const From* high, const Neighbours<T>& y, const Neighbours<T>& x,
                                      int64_t step) {
  const auto along_x = [&](const From* row) {
    return x.blend(read<T>(row[x.low * step]), read<T>(row[x.high * step]));
  };
  return y.blend(along_x(low), along_x(high));
}

// One scale of a tile: rows [strips][L][C][S], interpolated. C at compile time, or 0 to take it from the call.
template <int C, int S, typename From, typename T>
__device__ void stage_scale(const Call<T>& call, int i, const Tile& tile, const AxisTables<T>& axes, T* rows) {
  const Scale& scale = call.scales[i];
  const Tiling& tiling = call.tiling;
  const int classes = C > 0 ? C : call.num_classes;
  const From* const image = static_cast<const From*>(scale.logits) + tile.sample * scale.stride[0];
  const int pixels = tiling.strips * S;
  const int at_z = axes.begin(tiling, i, 0), at_y = axes.begin(tiling, i, 1), at_x = axes.begin(tiling, i, 2);
  const auto row_of = [&](int p) { return rows + (p / S * call.num_scales + i) * classes * S + p % S; };
  const int step = scale.quads ? 4 : 1;
  for (int p = threadIdx.x * step; p < pixels; p += blockDim.x * step) {
    const Place at = offset_of(tiling, p);
    T* const to = row_of(p);
    if (scale.same) {
      const From* from = image + axes.low[at_z + at.z] * scale.stride[2] + axes.low[at_y + at.y] * scale.stride[3];
      if (step == 4 && tile.origin.x + at.x + 3 < call.full[2]) {
        from += tile.origin.x + at.x;
#pragma unroll 4
        for (int c = 0; c < classes; ++c) {
          const Pack<From, 4> four = load<4>(from + c * scale.stride[1]);
          store(to + c * S,
                Pack<T, 4>{read<T>(four.at[0]), read<T>(four.at[1]), read<T>(four.at[2]), read<T>(four.at[3])});
        }
        continue;
      }
      for (int k = 0; k < step; ++k) {
        const From* const one = from + axes.low[at_x + at.x + k] * scale.stride[4];
#pragma unroll 4
        for (int c = 0; c < classes; ++c) to[c * S + k] = read<T>(one[c * scale.stride[1]]);
      }
      continue;
    }
    const Neighbours<T> z(axes.low[at_z + at.z], axes.weight[at_z + at.z]);
    const Neighbours<T> y(axes.low[at_y + at.y], axes.weight[at_y + at.y]);
    const Neighbours<T> x(axes.low[at_x + at.x], axes.weight[at_x + at.x]);
    const int64_t to_y0 = y.low * scale.stride[3], to_y1 = y.high * scale.stride[3];
    const From* const plane = image + z.low * scale.stride[2];
    const int64_t up = (z.high - z.low) * scale.stride[2];
    if (scale.size[0] == 1) {
#pragma unroll 4
      for (int c = 0; c < classes; ++c) {
        const From* const own = plane + c * scale.stride[1];
        to[c * S] = in_plane(own + to_y0, own + to_y1, y, x, scale.stride[4]);
      }
    } else {
#pragma unroll 2
      for (int c = 0; c < classes; ++c) {
        const From* const own = plane + c * scale.stride[1];
        const T a = in_plane(own + to_y0, own + to_y1, y, x, scale.stride[4]);
        const T b = in_plane(own + up + to_y0, own + up + to_y1, y, x, scale.stride[4]);
        to[c * S] = z.blend(a, b);
      }
    }
  }
}

// All scales of a tile; all threads of the block. Scales that no map uses keep what was there.
template <int C, int S, typename T>
__device__ void stage_logits(const Call<T>& call, const Tile& tile, const AxisTables<T>& axes, T* rows) {
#pragma unroll 1
  for (int i = 0; i < call.num_scales; ++i) {
    if (!call.scales[i].used) continue;
    if constexpr (sizeof(T) == sizeof(double)) {
      stage_scale<C, S, double>(call, i, tile, axes, rows);
    } else {
      switch (static_cast<LogitType>(call.logit_type)) {
        case LogitType::kHalf: stage_scale<C, S, __half>(call, i, tile, axes, rows); break;
        case LogitType::kBFloat16: stage_scale<C, S, __nv_bfloat16>(call, i, tile, axes, rows); break;
        default: stage_scale<C, S, float>(call, i, tile, axes, rows);
      }
    }
  }
}

}  // namespace lomix::cuda
