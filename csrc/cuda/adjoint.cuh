// Gradients of a tile, taken back from full to native resolution.
//
// Nothing is added to memory by two blocks: each tile writes what it touches to a place of its own, and
// gather_gradients sums the tiles of each native pixel, always in the same order.
#pragma once

#include "tile.cuh"

namespace lomix::cuda {

// Pixels of a tile, first <= k < last along an axis, that may read native coordinate n; those that do not, have no
// weight there. Floats suffice: the slack is larger than their rounding.
struct Range {
  int first, last;
};

__device__ __forceinline__ Range readers(int n, int origin, int length, int full, int native) {
  const float ratio = static_cast<float>(full) / static_cast<float>(native);
  const float slack = 0.01f + 1e-6f * static_cast<float>(full);
  const float low = (static_cast<float>(n) - 0.5f) * ratio - 0.5f - slack;
  const float high = (static_cast<float>(n) + 1.5f) * ratio - 0.5f + slack;
  const int end = min(length, full - origin);  // nothing past the border
  Range range{0, end};
  if (n > 0) range.first = max(0, min(end, static_cast<int>(ceilf(low)) - origin));
  if (n < native - 1) range.last = min(end, static_cast<int>(floorf(high)) + 1 - origin);
  return range;
}

// Weight of native coordinate n in a pixel with lower neighbour `low`.
template <typename T>
__device__ __forceinline__ T weight_of(int n, int low, T weight, int native) {
  const T lower = low == n ? T(1) - weight : T(0);
  return min(low + 1, native - 1) == n ? lower + weight : lower;
}

// Adjoint of the interpolation along one axis: to[outer][reach][inner] from values(outer, k, inner), k along the axis.
template <typename T, typename F>
__device__ void contract(const Call<T>& call, const Tile& tile, const AxisTables<T>& axes, int i, int axis, int outer,
                         int inner, T* to, const F& values) {
  const Scale& scale = call.scales[i];
  const int reach = scale.reach[axis], native = scale.size[axis], full = call.full[axis];
  const int origin = axis == 0 ? tile.origin.z : axis == 1 ? tile.origin.y : tile.origin.x;
  const int length = 1 << call.tiling.log_size[axis];
  const int at = axes.begin(call.tiling, i, axis), lowest = axes.low[at];
  for (int e = threadIdx.x; e < outer * reach * inner; e += blockDim.x) {
    const int in = e % inner, f = e / inner % reach, out = e / inner / reach, n = lowest + f;
    T sum = T(0);
    if (n < native) {
      const Range range = readers(n, origin, length, full, native);
      for (int k = range.first; k < range.last; ++k) {
        sum = fused(weight_of(n, axes.low[at + k], axes.weight[at + k], native), values(out, k, in), sum);
      }
    }
    to[e] = sum;
  }
}

template <int S, typename To, typename T>
__device__ void store_same(const Call<T>& call, int i, const Tile& tile, const T* grads) {
  const Scale& scale = call.scales[i];
  const int classes = call.num_classes;
  for (int p = threadIdx.x; p < call.tiling.strips * S; p += blockDim.x) {
    const Place at = offset_of(call.tiling, p);
    if (!is_inside(call, tile, at)) continue;
    const T* const from = grads + (p / S * call.num_scales + i) * classes * S + p % S;
    To* const to = static_cast<To*>(scale.grad) + tile.sample * scale.grad_stride[0] +
                   (tile.origin.z + at.z) * scale.grad_stride[2] + (tile.origin.y + at.y) * scale.grad_stride[3] +
                   (tile.origin.x + at.x) * scale.grad_stride[4];
#pragma unroll 4
    for (int c = 0; c < classes; ++c) write(to + c * scale.grad_stride[1], from[c * S]);
  }
}

// Finish the gradients of a tile, rows [strips][L][C][S]; all threads of the block, with a barrier before and after.
// `room` holds what is between the axes: see room_of.
template <int S, typename T>
__device__ void finish_tile(const Call<T>& call, const Tile& tile, const AxisTables<T>& axes, const T* grads, T* room) {
  const Tiling& tiling = call.tiling;
  const int classes = call.num_classes, strips_apart = call.num_scales * classes * S;
  const int nz = 1 << tiling.log_size[0], ny = 1 << tiling.log_size[1], sx = tiling.log_size[2];
#pragma unroll 1
  for (int i = 0; i < call.num_scales; ++i) {
    const Scale& scale = call.scales[i];
    if (!scale.used) continue;
    if (scale.same) {
      if constexpr (sizeof(T) == sizeof(double)) {
        store_same<S, double>(call, i, tile, grads);
      } else {
        switch (static_cast<LogitType>(call.logit_type)) {
          case LogitType::kHalf: store_same<S, __half>(call, i, tile, grads); break;
          case LogitType::kBFloat16: store_same<S, __nv_bfloat16>(call, i, tile, grads); break;
          default: store_same<S, float>(call, i, tile, grads);
        }
      }
      continue;
    }
    const int rz = scale.reach[0], ry = scale.reach[1], rx = scale.reach[2];
    T* const next = room + classes * nz * ny * rx;
    T* const to = call.native_partial + scale.partial +
                  (tile.sample * tiling.per_sample + tile.number) * static_cast<int64_t>(classes) * rz * ry * rx;
    const T* const own = grads + i * classes * S;
    contract(call, tile, axes, i, 2, classes * nz * ny, 1, room, [&](int row, int k, int) {
      const int c = row / (nz * ny), p = (row % (nz * ny) << sx) + k;
      return own[p / S * strips_apart + c * S + p % S];
    });
    __syncthreads();
    contract(call, tile, axes, i, 1, classes * nz, rx, next,
             [&](int row, int k, int x) { return room[(row * ny + k) * rx + x]; });
    __syncthreads();
    contract(call, tile, axes, i, 0, classes, ry * rx, to,
             [&](int c, int k, int yx) { return next[(c * nz + k) * (ry * rx) + yx]; });
    __syncthreads();  // the next scale needs the room
  }
}

}  // namespace lomix::cuda
