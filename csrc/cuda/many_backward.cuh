// Gradients of all maps for any number of classes; the class-tiled sibling of few_backward.cuh. A lane owns one pixel;
// its map, the map's gradient and the gradients of its logits lie in the block's scratch.
#pragma once

#include "adjoint.cuh"
#include "many_maps.cuh"

namespace lomix::cuda {

template <typename T>
struct ManyPixel {
  ManyLane<T> lane;
  T* grads;  // [L][C][32], at the lane's pixel
  T* along;  // [kMaxScales][32]

  __device__ __forceinline__ T& grad(int scale, int c) const {
    return grads[(scale * lane.call->num_classes + c) * kLanes];
  }
};

// dLoss/dmap to lane.map, see `differentiate_general` in few_target.cuh.
template <typename T>
__device__ void differentiate_many(const ManyLane<T>& lane, Mix mix, unsigned members, int index, int first_pair,
                                   const T* g) {
  const int classes = lane.call->num_classes;
  const T two = lane.call->squared ? T(2) : T(0), one = lane.call->squared ? T(0) : T(1), g_ce = g[0];
  const Softmax<T> all = make_whole(lane, mix, members, index, first_pair);
  const T inverse = lane.label == kOutside ? T(0) : quotient(T(1), all.sum);
  const T dice = lane.dice(), loss = g_ce * lane.ce();
  const Target<T>& target = lane.call->target;
  const bool general = lane.call->general, sigmoid = target.sigmoid;
  const auto pull_of = [&](int c, T s, T y) { return fused(g[1 + c], y, g[1 + classes + c] * fused(s, two, one)); };
  const auto share = [&](int c, T y) { return general ? lane.share(c, y) : y; };
  T dot = T(0), whole = T(0);
  for (int c = 0; c < classes; ++c) {
    const T y = lane.target(c), t = share(c, y);
    const Sigmoid<T> s = probability(lane, all, inverse, c);
    const T pull = pull_of(c, s.value, y);
    if (sigmoid) {
      lane.map[c * kLanes] = fused(loss, fused(T(1) - y + t, s.value, -t), dice * s.slope * pull);
    } else {
      lane.map[c * kLanes] = s.value;
      dot = fused(s.value, pull, dot);
      whole += t;
    }
  }
  if (sigmoid) return;
  dot = fused(loss, whole, -dice * dot);
  for (int c = 0; c < classes; ++c) {
    const T s = lane.map[c * kLanes], y = lane.target(c);
    lane.map[c * kLanes] = fused(s, fused(dice, pull_of(c, s, y), dot), -loss * share(c, y));
  }
}

template <typename T>
__device__ void unmix_many(const ManyPixel<T>& px, Mix mix, const Subset& subset, const T* g) {
  const ManyLane<T>& lane = px.lane;
  const Call<T>& call = *lane.call;
  const int classes = call.num_classes;
  differentiate_many(lane, mix, subset.members, subset.index, subset.first_pair, g);
  if (mix == Mix::kMax) {
    for (int c = 0; c < classes; ++c) {
      T top = T(0);
      int winner = 0;
      for_members(subset.members, [&](int j, int scale) {
        if (is_above(lane.logit(scale, c), top, j == 0)) top = lane.logit(scale, c), winner = scale;
      });
      px.grad(winner, c) += lane.map[c * kLanes];
    }
  } else if (mix == Mix::kMul) {
    const bool is_bounded = call.target.bounded;
    for_members(subset.members, [&](int, int scale) {
      for (int c = 0; c < classes; ++c) {
        T d = lane.map[c * kLanes];
        if (is_bounded) d *= bounded_of(lane.logit(scale, c)).slope;
        for_members(subset.members & ~(1u << scale), [&](int, int other) {
          const T value = lane.logit(other, c);
          d *= is_bounded ? bounded_of(value).value : value;
        });
        px.grad(scale, c) += d;
      }
    });
  } else if (mix == Mix::kAwf) {
    T mean = T(0);
    for_members(subset.members, [&](int j, int scale) {
      T along = T(0);
      for (int c = 0; c < classes; ++c) along = fused(lane.map[c * kLanes], lane.logit(scale, c), along);
      px.along[j * kLanes] = along;
      mean = fused(lane.attention[j * kLanes], along, mean);
    });
    for_members(subset.members, [&](int j, int scale) {
      const T attention = lane.attention[j * kLanes], slope = attention * (px.along[j * kLanes] - mean);
      const T* const u = call.score + (subset.first_pair + j) * call.padded;
      lane.attention[j * kLanes] = slope;
      for (int c = 0; c < classes; ++c) {
        px.grad(scale, c) += fused(attention, lane.map[c * kLanes], slope * u[c]);
      }
    });
  } else if (mix == Mix::kCat) {
    for_members(subset.members, [&](int j, int scale) {
      const T* const matrix = call.weight + static_cast<int64_t>(subset.first_pair + j) * classes * call.padded;
      for (int c0 = 0; c0 < classes; c0 += 4) {
        T back[4] = {};
        for (int o = 0; o < classes; o += 4) {
          T d[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) d[k] = o + k < classes ? lane.map[(o + k) * kLanes] : T(0);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            T w[4];
            load_uniform(w, matrix + min(c0 + i, classes - 1) * call.padded + o);
#pragma unroll
            for (int k = 0; k < 4; ++k) back[i] = fused(w[k], d[k], back[i]);
          }
        }
        for (int i = 0; i < 4 && c0 + i < classes; ++i) px.grad(scale, c0 + i) += back[i];
      }
    });
  } else {
    const Factors<T> factors = factors_of<T>(mix, subset.members);
    for_members(subset.members, [&](int j, int scale) {
      const T factor = j == 0 ? factors.first : factors.other;
      for (int c = 0; c < classes; ++c) px.grad(scale, c) = fused(factor, lane.map[c * kLanes], px.grad(scale, c));
    });
  }
}

// Products of dLoss/dmap and of the gradients of the scores with a member's logits, over all pixels of a tile, added to
// `to` [C + 1][C + 1]. Strips lie `apart` numbers from each other in both. All threads of the block.
template <typename T>
__device__ void multiply_many(const Call<T>& call, const T* member, int member_apart, const T* map, const T* scores,
                              int apart, bool has_cat, bool with_bias, bool has_awf, T poison, T* to) {
  const int classes = call.num_classes, side = classes + 1, blocks = (classes + 3) / 4;
  const auto over_pixels = [&](const auto& f) {
    for (int strip = 0; strip < call.tiling.strips; ++strip) {
      for (int at = 0; at < kLanes; ++at) f(strip, at);
    }
  };
  for (int e = threadIdx.x; has_cat && e < blocks * blocks; e += kManyThreads) {
    const int o0 = e / blocks * 4, c0 = e % blocks * 4;
    T sum[4][4] = {};
    over_pixels([&](int strip, int at) {
      T d[4], value[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        d[k] = map[strip * apart + min(o0 + k, classes - 1) * kLanes + at];
        value[k] = member[strip * member_apart + min(c0 + k, classes - 1) * kLanes + at];
      }
#pragma unroll
      for (int o = 0; o < 4; ++o) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[o][c] = fused(d[o], value[c], sum[o][c]);
      }
    });
#pragma unroll
    for (int o = 0; o < 4; ++o) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (o0 + o < classes && c0 + c < classes) to[(o0 + o) * side + c0 + c] += sum[o][c] + poison;
      }
    }
  }
  for (int o = threadIdx.x; with_bias && o < classes; o += kManyThreads) {
    T sum = T(0);
    over_pixels([&](int strip, int at) { sum += map[strip * apart + o * kLanes + at]; });
    to[o * side + classes] += sum + poison;
  }
  for (int c = threadIdx.x; has_awf && c <= classes; c += kManyThreads) {
    T sum = T(0);
    over_pixels([&](int strip, int at) {
      const T value = c < classes ? member[strip * member_apart + c * kLanes + at] : T(1);
      sum = fused(scores[strip * apart + at], value, sum);
    });
    to[classes * side + c] += sum + poison;
  }
}

template <typename T>
__global__ void __launch_bounds__(kManyThreads, kManyBlocks) gradients_many(const __grid_constant__ Call<T> call) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Tiling& tiling = call.tiling;
  const int classes = call.num_classes, length = axis_length(tiling), lane = lane_of(), warp = warp_of();
  const int logits = call.num_scales * classes * kLanes, kept = (classes + kManyKept) * kLanes;  // of a strip
  const int pair = (classes + 1) * (classes + 1);
  const AxisTables<T> axes{reinterpret_cast<T*>(shared_memory),
                           reinterpret_cast<int*>(reinterpret_cast<T*>(shared_memory) + length * call.num_scales),
                           length};
  T* const rows = call.scratch + blockIdx.x * call.scratch_size;  // [strips][L][C][32]
  T* const grads = rows + kManyWarps * logits;                    // likewise
  T* const maps = grads + kManyWarps * logits;                    // [strips][C + kManyKept][32]
  const int target_rows = (call.general ? 2 : 0) + (call.target.dense ? classes : 0);
  T* const targets = maps + kManyWarps * kept;  // [strips][target_rows][32]
  T* const room = targets + kManyWarps * target_rows * kLanes;
  T* const products = call.products + static_cast<int64_t>(blockIdx.x) * call.num_pairs * pair;
  if (call.learned) {
    for (int e = threadIdx.x; e < call.num_pairs * pair; e += kManyThreads) products[e] = T(0);
  }
  for (int item = blockIdx.x; item < tiling.items; item += gridDim.x) {
    const int first = item % tiling.chunks * tiling.chunk_tiles;
    const int last = min(first + tiling.chunk_tiles, tiling.per_sample);
    for (int number = first; number < last; ++number) {
      const Tile tile = tile_at(call, item, number);
      fill_axes(call, tile, axes);
      __syncthreads();
      stage_logits<0, kLanes>(call, tile, axes, rows);
      T* const own = maps + warp * kept + lane;
      T* const own_target = targets + warp * target_rows * kLanes + lane;
      const ManyPixel<T> px{{&call, rows + warp * logits + lane, own, own + classes * kLanes, own_target,
                             many_label(call, tile, warp * kLanes + lane, own_target)},
                            grads + warp * logits + lane,
                            own + (classes + kMaxScales) * kLanes};
      for (int k = 0; k < call.num_scales * classes; ++k) px.grads[k * kLanes] = T(0);
      const T poison = poison_of(call, tile.sample);
      const T* const pull = call.grad_stats + tile.sample * call.num_maps * (1 + 2 * classes);
      __syncthreads();
      for (int s = 0; s < call.num_subsets; ++s) {
        const Subset& subset = call.subsets[s];
        const auto has = [&](Mix mix) { return subset.number[static_cast<int>(mix)] != kNoMap; };
        constexpr int kLast = static_cast<int>(Mix::kCat);  // it leaves dLoss/dmap for dW
        for (int k = 0; k < kMixes; ++k) {
          const Mix mix = static_cast<Mix>(k == kMixes - 1 ? kLast : k < kLast ? k : k + 1);
          if (has(mix)) {
            unmix_many(px, mix, subset, pull + subset.number[static_cast<int>(mix)] * (1 + 2 * classes));
          }
        }
        if (!has(Mix::kAwf) && !has(Mix::kCat)) continue;
        __syncthreads();
        for_members(subset.members, [&](int j, int scale) {
          multiply_many(call, rows + scale * classes * kLanes, logits, maps, maps + (classes + j) * kLanes, kept,
                        has(Mix::kCat), has(Mix::kCat) && j == 0, has(Mix::kAwf), poison,
                        products + static_cast<int64_t>(subset.first_pair + j) * pair);
        });
        __syncthreads();
      }
      for (int k = 0; k < call.num_scales * classes; ++k) px.grads[k * kLanes] += poison;
      __syncthreads();
      finish_tile<kLanes>(call, tile, axes, grads, room);
      __syncthreads();
    }
  }
}

}  // namespace lomix::cuda
