// What the torch glue hands to the CUDA kernels: plain data, no torch types, so that .cu files compile in seconds and
// anywhere. A call travels as a kernel argument, in constant memory: no tables are copied to the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../plan.h"

namespace lomix::cuda {

constexpr int kMostSubsets = (1 << kMaxScales) - 1;  // those of one member among them
constexpr int kNoMap = 0xffff;

// How the maps of a subset are made. A scale by itself is a sum of one. From kSub on only general calls have them.
enum class Mix : int { kSum = 0, kMul = 1, kCat = 2, kAwf = 3, kSub = 4, kAvg = 5, kMax = 6 };
constexpr int kMixes = 7;

// One supervised map, forward. Members are the set bits of `members`, the coarsest scale first; member number j owns
// pair first_pair + j of W and u.
struct Map {
  uint16_t members;
  uint16_t first_pair;
  uint16_t number;  // row of the statistics
  uint16_t code;    // mix << kMixShift | row of b
};
constexpr int kMixShift = 12;

// The maps of one subset, backward.
struct Subset {
  uint16_t members;
  uint16_t first_pair;
  uint16_t index;           // row of b
  uint16_t number[kMixes];  // rows of the statistics, kNoMap where the plan lacks the map
};

// One scale. Axes are z, y, x; those that are not there have size 1 and stride 0. Strides count elements.
struct Scale {
  const void* logits;      // [B, C, *size]
  void* grad;              // [B, C, *size]; null forward
  int64_t stride[5];       // of logits: b, c, z, y, x
  int64_t grad_stride[5];  // of grad
  int64_t partial;         // where the gradients of its tiles begin in Call::native_partial
  int size[3];
  int reach[3];  // native pixels that a tile can touch
  int near[3];   // tiles, from the first on, that can touch a native pixel
  bool used;     // enters a map
  bool same;     // native size is the full size
  bool quads;    // `same`, and four pixels along x can be loaded at once
};

// Sizes of the tiles that one launch works on.
struct Tiling {
  int log_size[3];  // log2 of pixels along z, y, x
  int strips;       // a strip is what 32 lanes take at once
  int tiles[3];     // of a sample
  int per_sample;   // tiles
  int chunks;       // parts of a sample; an item is one chunk of one sample
  int chunk_tiles;
  int items;
  int blocks;
};

// How the target of a general call is read and weighed. With y the target of class c, cross-entropy takes
// t = ce_weight_c (own_share y + any_share) as the share of that class.
template <typename T>
struct Target {
  const void* weight;  // of pixels [B, *full], or null: 1 everywhere
  const T* ce_weight;  // [C]
  int64_t weight_stride[4];
  int64_t class_stride;  // of a dense target
  int64_t ignore_index;
  T own_share, any_share;
  int weight_type;   // LabelType
  bool has_ignored;  // pixels with ignore_index have weight 0
  bool dense;        // `labels` has one value a class
  bool sigmoid;      // probabilities are sigmoids rather than a softmax
  bool weighted_ce;  // the weight of a pixel is that of its cross-entropy too
  bool bounded;      // products are of bounded factors
};

template <typename T>
struct Call {
  int64_t label_stride[4];  // b, z, y, x
  const void* labels;       // [B, *full], or [B, C, *full] where the target is dense
  // The parameters as pack_parameters lays them out; `padded` is C rounded up to 4.
  const T* weight;      // [K, C (in), padded (out)]
  const T* bias;        // [S, padded]
  const T* score;       // [K, padded]
  const T* score_bias;  // [K]
  T* scratch;           // scratch_size numbers for each block; what does not fit shared memory
  int64_t scratch_size;
  // forward
  T* partial;   // [items, M, 1 + 2C]
  int* counts;  // [items, 1 + C]: labels that are no class, then pixels of each class
  // backward
  const T* grad_stats;  // [B, M, 1 + 2C]
  const int* bad;       // [B], not 0 where a label is no class
  T* native_partial;    // of each scale [B, tiles, C, reach_z, reach_y, reach_x]
  T* products;          // [blocks, K, C + 1, C + 1]: dW, in the last column db, in the last row du and dv
  Tiling tiling;
  int full[3];
  int batch, num_scales, num_classes, num_maps, num_subsets, num_pairs;
  int padded;
  int logit_type, label_type;  // LogitType, LabelType
  int warp_sums;               // backward: numbers of shared memory for the products of one warp
  bool few;                    // all classes in registers: few.cu, few_general.cu
  bool general;                // more than class numbers that count alike, the paper's operators and a softmax
  bool squared;                // Q_c sums s^2 rather than s
  bool learned;                // some map has parameters
  bool room_in_shared;         // backward: what lies between the axes of the adjoint fits the shared scratch
  Target<T> target;            // of general calls
  Scale scales[kMaxScales];
  Map maps[kMostMaps];  // those that take longest first
  Subset subsets[kMostSubsets];
};

// What a launch can pass, from CUDA 12.1 and compute capability 7.0 on.
static_assert(sizeof(Call<double>) <= 32764);

// Bytes of shared memory: of a block of this launch, and the most that the device gives one.
struct Memory {
  int64_t shared;
  int most;
};

template <typename T>
struct Parameters {
  const T* cat_weight;  // [K, C (out), C (in)] or null
  const T* cat_bias;    // [S, C] or null
  const T* awf_weight;  // [K, C] or null
  const T* awf_bias;    // [K] or null
  int pairs, subsets, classes, padded;
};

// Numbers that pack_parameters writes: W and b, then u and v, as far as they are given.
template <typename T>
constexpr int64_t packed_size(const Parameters<T>& given) {
  const int64_t C = given.classes, P = given.padded, K = given.pairs, S = given.subsets;
  return (given.cat_weight != nullptr ? (K * C + S) * P : 0) + (given.awf_weight != nullptr ? K * (P + 1) : 0);
}

// Each returns what its launch returned, and waits for nothing.
template <typename T>
cudaError_t pack_parameters(const Parameters<T>& given, T* packed, cudaStream_t stream);
template <typename T>
cudaError_t launch_statistics(const Call<T>& call, Memory memory, cudaStream_t stream);
template <typename T>
cudaError_t finish_statistics(const Call<T>& call, T* stats, T* target_stats, cudaStream_t stream);
template <typename T>
cudaError_t find_bad_labels(const Call<T>& call, int* bad, cudaStream_t stream);
template <typename T>
cudaError_t launch_gradients(const Call<T>& call, Memory memory, cudaStream_t stream);
template <typename T>
cudaError_t gather_gradients(const Call<T>& call, cudaStream_t stream);
template <typename T>
cudaError_t finish_parameters(const Call<T>& call, T* weight, T* bias, T* score, T* score_bias, cudaStream_t stream);

// One instance for each number of classes, few.cu; of general calls in few_general.cu.
template <int C, bool kGeneral>
cudaError_t launch_statistics_few(const Call<float>& call, Memory memory, cudaStream_t stream);
template <int C, bool kGeneral>
cudaError_t launch_gradients_few(const Call<float>& call, Memory memory, cudaStream_t stream);

}  // namespace lomix::cuda
