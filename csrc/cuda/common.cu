// What comes before and after the kernels over pixels: parameters packed, bad labels found, partial sums added up.
#include <algorithm>

#include "launch.cuh"
#include "tile.cuh"

namespace lomix::cuda {
namespace {

constexpr int kThreads = 256;

int64_t blocks_for(int64_t work) { return (work + kThreads - 1) / kThreads; }
dim3 grid_for(int64_t work) { return dim3(static_cast<unsigned>(blocks_for(work))); }

__device__ __forceinline__ int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// [K, C (out), C (in)] -> [K, C (in), padded (out)], and the others padded likewise; one number a thread.
template <typename T>
__global__ void pack_kernel(const Parameters<T> given, T* packed) {
  const int64_t C = given.classes, P = given.padded, K = given.pairs, S = given.subsets;
  int64_t e = thread_number();
  const auto padded_row = [&](const T* from, int64_t at) { return at % P < C ? from[at / P * C + at % P] : T(0); };
  T* to = packed + e;
  if (given.cat_weight != nullptr) {
    if (e < K * C * P) {
      const int64_t out = e % P, in = e / P % C, pair = e / P / C;
      *to = out < C ? given.cat_weight[(pair * C + out) * C + in] : T(0);
      return;
    }
    e -= K * C * P;
    if (e < S * P) {
      *to = padded_row(given.cat_bias, e);
      return;
    }
    e -= S * P;
  }
  if (given.awf_weight == nullptr) return;
  if (e < K * P) {
    *to = padded_row(given.awf_weight, e);
  } else if (e < K * P + K) {
    *to = given.awf_bias[e - K * P];
  }
}

// Sums of all items of a sample, in their order and in double. The label counts come last.
template <typename T>
__global__ void finish_kernel(const __grid_constant__ Call<T> call, T* stats, T* target_stats) {
  const int C = call.num_classes, width = 1 + 2 * C, chunks = call.tiling.chunks;
  const int64_t columns = static_cast<int64_t>(call.num_maps) * width, e = thread_number();
  const auto total = [&](const auto* from, int64_t b, int64_t column, int64_t apart) {
    double sum = 0;
    for (int i = 0; i < chunks; ++i) sum += static_cast<double>(from[(b * chunks + i) * apart + column]);
    return sum;
  };
  if (e < call.batch * columns) {
    const int64_t b = e / columns, column = e % columns;
    const int k = static_cast<int>(column % width);
    double sum = total(call.partial, b, column, columns);
    // A probability that is no number spoils I_c also where c is not the label, as in plain PyTorch: 0 * NaN. The
    // kernels choose instead of multiplying; Q_c has seen every probability.
    if (k >= 1 && k <= C) sum += 0 * total(call.partial, b, column + C, columns);
    const bool is_bad = total(call.counts, b, 0, 1 + C) > 0;
    stats[e] = is_bad ? static_cast<T>(NAN) : static_cast<T>(sum);
  } else if (e < call.batch * (columns + 1 + C)) {
    const int64_t at = e - call.batch * columns, b = at / (1 + C), k = at % (1 + C);
    const double pixels = static_cast<double>(call.full[0]) * call.full[1] * call.full[2];
    target_stats[at] = static_cast<T>(k == 0 ? pixels : total(call.counts, b, k, 1 + C));
  }
}

// Grid (blocks, B).
template <typename T>
__global__ void label_kernel(const __grid_constant__ Call<T> call, int* bad) {
  const int64_t width = call.full[2], height = call.full[1], pixels = width * height * call.full[0];
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t b = blockIdx.y; b < call.batch; b += gridDim.y) {
    bool found = false;
    for (int64_t p = thread_number(); p < pixels; p += step) {
      const int z = static_cast<int>(p / width / height), y = static_cast<int>(p / width % height);
      found |= label_at<true>(call, b, z, y, static_cast<int>(p % width)) == kBad;
    }
    if (__syncthreads_or(found ? 1 : 0) != 0 && threadIdx.x == 0) atomicOr(&bad[b], 1);
  }
}

// The first tile of n pixels that can touch native coordinate `at` along an axis.
__device__ __forceinline__ int first_tile(int at, int full, int native, int log_size) {
  const int64_t out = ((2 * static_cast<int64_t>(at) - 1) * full - native) / (int64_t{2} * native);
  return out <= 0 ? 0 : static_cast<int>(out >> log_size);
}

// Tiles above which the lanes of a warp share the sum of one native pixel.
constexpr int kMostTiles = 64;

__device__ __forceinline__ bool is_shared(const Scale& scale) {
  return static_cast<int64_t>(scale.near[0]) * scale.near[1] * scale.near[2] > kMostTiles;
}

// Sum of the tiles that touch one native pixel, in their order and in double; of every `step`th of them from `begin`
// on.
template <typename T>
__device__ double gather_one(const Call<T>& call, const Scale& scale, int64_t b, int c, const int (&at)[3], int begin,
                             int step) {
  const Tiling& tiling = call.tiling;
  int first[3];
  for (int axis = 0; axis < 3; ++axis) {
    first[axis] = first_tile(at[axis], call.full[axis], scale.size[axis], tiling.log_size[axis]);
  }
  // Place among the native pixels that a tile touches, or -1.
  const auto place = [&](int axis, int number) {
    if (number >= tiling.tiles[axis]) return -1;
    const int64_t origin = static_cast<int64_t>(number) << tiling.log_size[axis];
    const auto from = source<T, int64_t>(origin, call.full[axis], scale.size[axis]);
    const int64_t f = at[axis] - from.low;
    return f >= 0 && f < scale.reach[axis] ? static_cast<int>(f) : -1;
  };
  const int64_t cells = static_cast<int64_t>(scale.reach[0]) * scale.reach[1] * scale.reach[2];
  double sum = 0;
  int turn = 0;
  for (int dz = 0; dz < scale.near[0]; ++dz) {
    const int fz = place(0, first[0] + dz);
    for (int dy = 0; dy < scale.near[1] && fz >= 0; ++dy) {
      const int fy = place(1, first[1] + dy);
      for (int dx = 0; dx < scale.near[2] && fy >= 0; ++dx) {
        if ((turn++ & (step - 1)) != begin) continue;
        const int fx = place(2, first[2] + dx);
        if (fx < 0) continue;
        const int64_t tile =
            (static_cast<int64_t>(first[0] + dz) * tiling.tiles[1] + first[1] + dy) * tiling.tiles[2] + first[2] + dx;
        const int64_t cell = ((b * tiling.per_sample + tile) * call.num_classes + c) * cells +
                             (static_cast<int64_t>(fz) * scale.reach[1] + fy) * scale.reach[2] + fx;
        sum += static_cast<double>(call.native_partial[scale.partial + cell]);
      }
    }
  }
  return sum;
}

// Grid (blocks, L); one native element a thread, or a warp where many tiles touch it.
template <typename T>
__global__ void gather_kernel(const __grid_constant__ Call<T> call) {
  const Scale& scale = call.scales[blockIdx.y];
  if (!scale.used || scale.same) return;
  const int64_t nx = scale.size[2], ny = scale.size[1], nz = scale.size[0];
  const int step = is_shared(scale) ? kLanes : 1;
  int64_t rest = thread_number() / step;
  if (rest >= nx * ny * nz * call.num_classes * call.batch) return;  // whole warps leave
  const int x = static_cast<int>(rest % nx), y = static_cast<int>(rest / nx % ny);
  const int z = static_cast<int>(rest / nx / ny % nz);
  rest = rest / nx / ny / nz;
  const int c = static_cast<int>(rest % call.num_classes);
  const int64_t b = rest / call.num_classes;
  double total = gather_one(call, scale, b, c, {z, y, x}, static_cast<int>(threadIdx.x) % step, step);
  if (step > 1) {
    total = lane_sum(total);
    if (lane_of() != 0) return;
  }
  const T sum = static_cast<T>(total);
  const int64_t at = b * scale.grad_stride[0] + c * scale.grad_stride[1] + z * scale.grad_stride[2] +
                     y * scale.grad_stride[3] + x * scale.grad_stride[4];
  switch (static_cast<LogitType>(call.logit_type)) {
    case LogitType::kHalf: write(static_cast<__half*>(scale.grad) + at, sum); break;
    case LogitType::kBFloat16: write(static_cast<__nv_bfloat16*>(scale.grad) + at, sum); break;
    case LogitType::kDouble: write(static_cast<double*>(scale.grad) + at, sum); break;
    default: write(static_cast<float*>(scale.grad) + at, sum);
  }
}

// Products of all blocks, in their order and in double -> dW [K, C, C], db [S, C], du [K, C], dv [K].
template <typename T>
__global__ void parameter_kernel(const __grid_constant__ Call<T> call, T* weight, T* bias, T* score, T* score_bias) {
  const int64_t C = call.num_classes, side = C + 1, all = call.num_pairs * side * side, e = thread_number();
  if (e >= all) return;
  double sum = 0;
  for (int i = 0; i < call.tiling.blocks; ++i) sum += static_cast<double>(call.products[i * all + e]);
  const int64_t pair = e / side / side, row = e / side % side, column = e % side;
  if (row < C && column < C) {
    if (weight != nullptr) weight[(pair * C + row) * C + column] = static_cast<T>(sum);
  } else if (row == C) {
    if (score != nullptr) (column < C ? score[pair * C + column] : score_bias[pair]) = static_cast<T>(sum);
  } else if (bias != nullptr) {
    // A bias meets all pixels once: with the first member of its subset.
    for (int s = 0; s < call.num_subsets; ++s) {
      const Subset& subset = call.subsets[s];
      const bool is_cat = subset.number[static_cast<int>(Mix::kCat)] != kNoMap;
      if (is_cat && subset.first_pair == pair) bias[subset.index * C + row] = static_cast<T>(sum);
    }
  }
}

}  // namespace

template <typename T>
cudaError_t pack_parameters(const Parameters<T>& given, T* packed, cudaStream_t stream) {
  if (packed_size(given) == 0) return cudaSuccess;
  return launch(pack_kernel<T>, grid_for(packed_size(given)), kThreads, {}, stream, given, packed);
}

template <typename T>
cudaError_t finish_statistics(const Call<T>& call, T* stats, T* target_stats, cudaStream_t stream) {
  const int64_t width = 1 + 2 * call.num_classes;
  const int64_t work = call.batch * (call.num_maps * width + 1 + call.num_classes);
  return launch(finish_kernel<T>, grid_for(work), kThreads, {}, stream, call, stats, target_stats);
}

template <typename T>
cudaError_t find_bad_labels(const Call<T>& call, int* bad, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(bad, 0, sizeof(int) * static_cast<size_t>(call.batch), stream);
  if (error != cudaSuccess || call.target.dense) return error;
  const int64_t pixels = static_cast<int64_t>(call.full[0]) * call.full[1] * call.full[2];
  const dim3 grid(static_cast<unsigned>(std::min(blocks_for(pixels), int64_t{256})),
                  static_cast<unsigned>(std::min(call.batch, 1024)));
  return launch(label_kernel<T>, grid, kThreads, {}, stream, call, bad);
}

template <typename T>
cudaError_t gather_gradients(const Call<T>& call, cudaStream_t stream) {
  int64_t most = 0;
  for (int i = 0; i < call.num_scales; ++i) {
    const Scale& scale = call.scales[i];
    const int64_t size = static_cast<int64_t>(scale.size[0]) * scale.size[1] * scale.size[2];
    const int64_t tiles = static_cast<int64_t>(scale.near[0]) * scale.near[1] * scale.near[2];
    const int64_t threads = size * call.num_classes * call.batch * (tiles > kMostTiles ? kLanes : 1);
    if (scale.used && !scale.same) most = std::max(most, threads);
  }
  if (most == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks_for(most)), static_cast<unsigned>(call.num_scales));
  return launch(gather_kernel<T>, grid, kThreads, {}, stream, call);
}

template <typename T>
cudaError_t finish_parameters(const Call<T>& call, T* weight, T* bias, T* score, T* score_bias, cudaStream_t stream) {
  if (!call.learned) return cudaSuccess;
  const int64_t side = call.num_classes + 1;
  return launch(parameter_kernel<T>, grid_for(call.num_pairs * side * side), kThreads, {}, stream, call, weight, bias,
                score, score_bias);
}

template cudaError_t pack_parameters(const Parameters<float>&, float*, cudaStream_t);
template cudaError_t pack_parameters(const Parameters<double>&, double*, cudaStream_t);
template cudaError_t finish_statistics(const Call<float>&, float*, float*, cudaStream_t);
template cudaError_t finish_statistics(const Call<double>&, double*, double*, cudaStream_t);
template cudaError_t find_bad_labels(const Call<float>&, int*, cudaStream_t);
template cudaError_t find_bad_labels(const Call<double>&, int*, cudaStream_t);
template cudaError_t gather_gradients(const Call<float>&, cudaStream_t);
template cudaError_t gather_gradients(const Call<double>&, cudaStream_t);
template cudaError_t finish_parameters(const Call<float>&, float*, float*, float*, float*, cudaStream_t);
template cudaError_t finish_parameters(const Call<double>&, double*, double*, double*, double*, cudaStream_t);

}  // namespace lomix::cuda
