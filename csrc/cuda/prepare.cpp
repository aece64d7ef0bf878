#include "prepare.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <map>

#include "../mix_math.h"

namespace lomix::cuda {
namespace {

// Buffers of all blocks together stay under these, or as few blocks run as it takes.
constexpr int64_t kScratchBytes = 64 << 20, kSumBytes = 64 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Mix mix_of(int64_t code) {
  switch (static_cast<Operator>(code)) {
    case Operator::kMul: return Mix::kMul;
    case Operator::kCat: return Mix::kCat;
    case Operator::kAwf: return Mix::kAwf;
    case Operator::kSub: return Mix::kSub;
    case Operator::kAvg: return Mix::kAvg;
    case Operator::kMax: return Mix::kMax;
    default: return Mix::kSum;
  }
}

// The most native pixels that a tile touches along an axis; an upper bound where there are very many tiles.
int reach(int64_t full, int64_t native, int64_t tile) {
  if (full / tile > 4096) return static_cast<int>(std::min(native, (tile - 1) * native / full + 3));
  int64_t most = 1;
  for (int64_t first = 0; first < full; first += tile) {
    const int64_t last = std::min(first + tile, full) - 1;
    const int64_t high = std::min(source<double, int64_t>(last, full, native).low + 1, native - 1);
    most = std::max(most, high - source<double, int64_t>(first, full, native).low + 1);
  }
  return static_cast<int>(most);
}

// As many tiles, from the first on, as can touch a native pixel along an axis: 2 full / native pixels read it.
int near(int64_t full, int64_t native, int64_t tile) {
  return static_cast<int>(std::min(ceil_div(full, tile), 2 * full / (native * tile) + 2));
}

// What a strip costs a warp: it orders the maps, so that those that take long are not begun last.
int cost(const Map& map) {
  const int members = __builtin_popcount(map.members);
  switch (static_cast<Mix>(map.code >> kMixShift)) {
    case Mix::kCat: return 100 * members;
    case Mix::kAwf: return 20 * members;
    default: return members;
  }
}

}  // namespace

template <typename T>
Prepared<T>::Prepared(const Inputs& inputs, const DeviceFacts& device) : device_(device) {
  const at::Tensor& first = inputs.logits[0];
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(first.size(0) < kMost / 64, "logits: got shape ", first.sizes(),
                    ", expected less than 2^25 samples; cut the batch into parts");
  call.batch = static_cast<int>(first.size(0));
  call.num_scales = static_cast<int>(inputs.logits.size());
  call.num_classes = static_cast<int>(first.size(1));
  call.num_pairs = static_cast<int>(num_pairs(inputs));
  call.squared = inputs.rule.squared;
  call.logit_type = static_cast<int>(logit_type(first.scalar_type()));
  read_target(inputs);
  read_maps(inputs);
  read_scales(inputs);
}

template <typename T>
void Prepared<T>::read_target(const Inputs& inputs) {
  Target<T>& target = call.target;
  const Rule& rule = inputs.rule;
  target.dense = inputs.is_dense();
  const auto strides_of = [](const at::Tensor& tensor, size_t first_axis, int64_t (&to)[4]) {
    const std::array<int64_t, 3> stride = as_zyx(tensor.strides(), first_axis, 0);
    to[0] = tensor.stride(0);
    std::copy(stride.begin(), stride.end(), to + 1);
  };
  const size_t first_axis = target.dense ? 2 : 1;
  const at::ScalarType type = inputs.target.scalar_type();
  call.labels = inputs.target.const_data_ptr();
  call.label_type = static_cast<int>(target.dense ? number_type(type) : label_type(type));
  strides_of(inputs.target, first_axis, call.label_stride);
  const std::array<int64_t, 3> full = as_zyx(inputs.target.sizes(), first_axis, 1);
  for (int axis = 0; axis < 3; ++axis) {
    call.full[axis] = static_cast<int>(full[axis]);
  }
  call.general = !inputs.is_plain();
  target.class_stride = target.dense ? inputs.target.stride(1) : 0;
  target.has_ignored = rule.ignore_index.has_value();
  target.ignore_index = rule.ignore_index.value_or(0);
  target.sigmoid = rule.sigmoid;
  target.weighted_ce = rule.weighted_ce;
  target.own_share = static_cast<T>(1 - rule.label_smoothing);
  target.any_share = static_cast<T>(rule.label_smoothing / call.num_classes);
  if (inputs.weight_map.has_value()) {
    target.weight = inputs.weight_map->const_data_ptr();
    target.weight_type = static_cast<int>(number_type(inputs.weight_map->scalar_type()));
    strides_of(*inputs.weight_map, 1, target.weight_stride);
  }
}

template <typename T>
void Prepared<T>::read_scales(const Inputs& inputs) {
  for (int l = 0; l < call.num_scales; ++l) {
    const at::Tensor& z = inputs.logits[l];
    Scale& scale = call.scales[l];
    const std::array<int64_t, 3> size = as_zyx(z.sizes(), 2, 1), stride = as_zyx(z.strides(), 2, 0);
    scale.logits = z.const_data_ptr();
    scale.stride[0] = z.stride(0);
    scale.stride[1] = z.stride(1);
    scale.same = true;
    for (int axis = 0; axis < 3; ++axis) {
      scale.size[axis] = static_cast<int>(size[axis]);
      scale.stride[2 + axis] = stride[axis];
      scale.same &= size[axis] == call.full[axis];
    }
    // Four neighbours can be loaded at once where every row begins at a multiple of four.
    const auto is_multiple = [](int64_t n) { return n % 4 == 0; };
    scale.quads = scale.same && scale.stride[4] == 1 && std::all_of(scale.stride, scale.stride + 4, is_multiple) &&
                  reinterpret_cast<uintptr_t>(scale.logits) % (4 * z.element_size()) == 0;
  }
}

template <typename T>
void Prepared<T>::read_maps(const Inputs& inputs) {
  constexpr int64_t kMostRows = std::numeric_limits<uint16_t>::max(), kMostBiases = 1 << kMixShift;
  TORCH_CHECK_VALUE(num_pairs(inputs) <= kMostRows && num_subsets(inputs) <= kMostBiases,
                    "cat_weight and cat_bias: got ", num_pairs(inputs), " pairs of ", num_subsets(inputs),
                    " subsets, expected at most ", kMostRows, " and ", kMostBiases);
  call.num_maps = static_cast<int>(inputs.maps.size() / 4);
  std::map<int64_t, int> place;  // of each set of members among the subsets
  for (int m = 0; m < call.num_maps; ++m) {
    const int64_t* const code = inputs.maps.data() + 4 * m;  // operator, members, row of b, first pair
    const Mix mix = mix_of(code[0]);
    const bool has_rows = mix == Mix::kCat || mix == Mix::kAwf;
    const int64_t index = mix == Mix::kCat ? code[2] : 0, pair = has_rows ? code[3] : 0;
    call.learned |= has_rows;
    const bool is_bounded = mix == Mix::kMul && inputs.rule.bounded;
    call.target.bounded |= is_bounded;
    call.general |= is_bounded || mix >= Mix::kSub;
    call.maps[m] = {static_cast<uint16_t>(code[1]), static_cast<uint16_t>(pair), static_cast<uint16_t>(m),
                    static_cast<uint16_t>(static_cast<int64_t>(mix) << kMixShift | index)};
    for (int l = 0; l < call.num_scales; ++l) call.scales[l].used |= (code[1] >> l & 1) != 0;
    const auto [at, is_new] = place.try_emplace(code[1], call.num_subsets);
    Subset& subset = call.subsets[at->second];
    if (is_new) {
      ++call.num_subsets;
      subset = {static_cast<uint16_t>(code[1]), 0, 0, {}};
      std::fill(std::begin(subset.number), std::end(subset.number), static_cast<uint16_t>(kNoMap));
    }
    if (has_rows) subset.first_pair = static_cast<uint16_t>(pair);
    if (mix == Mix::kCat) subset.index = static_cast<uint16_t>(index);
    subset.number[static_cast<int>(mix)] = static_cast<uint16_t>(m);
  }
  std::stable_sort(call.maps, call.maps + call.num_maps, [](const Map& a, const Map& b) { return cost(a) > cost(b); });
}

template <typename T>
void Prepared<T>::pack(const Inputs& inputs, cudaStream_t stream) {
  const auto data = [&](const std::optional<at::Tensor>& given) -> const T* {
    if (!given.has_value() || given->numel() == 0) return nullptr;
    kept_.push_back(given->to(c10::CppTypeToScalarType<T>::value).contiguous());
    return kept_.back().template const_data_ptr<T>();
  };
  const auto options = inputs.logits[0].options().dtype(c10::CppTypeToScalarType<T>::value);
  if (call.general) {
    call.target.ce_weight = data(inputs.ce_weight);
    if (call.target.ce_weight == nullptr) {
      kept_.push_back(at::ones({call.num_classes}, options));
      call.target.ce_weight = kept_.back().template const_data_ptr<T>();
    }
  }
  const int64_t subsets = num_subsets(inputs), padded = call.padded;
  const Parameters<T> given{
      data(inputs.cat_weight), data(inputs.cat_bias),     data(inputs.awf_weight), data(inputs.awf_bias),
      call.num_pairs,          static_cast<int>(subsets), call.num_classes,        call.padded};
  if (packed_size(given) == 0) return;
  kept_.push_back(at::empty({packed_size(given)}, options));
  T* const packed = kept_.back().template mutable_data_ptr<T>();
  check(pack_parameters(given, packed, stream), "packing the parameters");
  const T* next = packed;
  if (given.cat_weight != nullptr) {
    call.weight = next;
    call.bias = call.weight + call.num_pairs * call.num_classes * padded;
    next = call.bias + subsets * padded;
  }
  if (given.awf_weight != nullptr) {
    call.score = next;
    call.score_bias = call.score + call.num_pairs * padded;
  }
}

template <typename T>
Problem Prepared<T>::problem(bool few) const {
  return {call.num_classes, call.num_scales, call.learned, call.general, call.target.dense, few};
}

template <typename T>
int64_t Prepared<T>::length() const {
  const int* const log_size = call.tiling.log_size;
  return (1 << log_size[0]) + (1 << log_size[1]) + (1 << log_size[2]);
}

// Tiles of 2^k pixels along each axis, as large as shared memory allows, no larger than the image needs, and at least
// two for each block that runs at once. Along x up to 8 pixels first, for whole sectors of memory; then evenly.
template <typename T>
void Prepared<T>::choose_tiles(const Shape& shape, int64_t most_shared) {
  Tiling& tiling = call.tiling;
  const auto grow = [&](int64_t pixels) {
    int* const log_size = tiling.log_size;
    std::fill(log_size, log_size + 3, 0);
    for (int64_t made = 1; made < pixels; made *= 2) {
      int axis = 2;
      const auto is_open = [&](int a) { return (1 << log_size[a]) < call.full[a]; };
      if (log_size[2] >= 3 || !is_open(2)) {
        for (const int other : {1, 0}) {
          if (is_open(other) && (log_size[other] < log_size[axis] || !is_open(axis))) axis = other;
        }
      }
      ++log_size[axis];
    }
    int64_t per_sample = 1;
    for (int a = 0; a < 3; ++a) {
      tiling.tiles[a] = static_cast<int>(ceil_div(call.full[a], 1 << log_size[a]));
      per_sample *= tiling.tiles[a];
      TORCH_CHECK_VALUE(per_sample <= std::numeric_limits<int>::max(), "target: got ", call.full[0], " x ",
                        call.full[1], " x ", call.full[2],
                        " pixels, expected at most 2^31 tiles of them; cut it into parts");
    }
    tiling.per_sample = static_cast<int>(per_sample);
  };
  const int64_t image = static_cast<int64_t>(call.full[0]) * call.full[1] * call.full[2];
  int64_t strips = shape.most_strips;
  for (;; strips /= 2) {
    grow(strips * shape.strip);
    if (strips <= shape.least_strips) break;
    const bool fits = shared_bytes<T>(shape, strips, length(), call.num_scales) <= most_shared;
    const int64_t tiles = static_cast<int64_t>(call.batch) * tiling.per_sample;
    const bool is_enough = tiles >= 2 * int64_t{shape.blocks} * device_.multiprocessors;
    if (fits && strips * shape.strip < 2 * image && (is_enough || strips <= 4 * shape.least_strips)) break;
  }
  tiling.strips = static_cast<int>(strips);
  for (int l = 0; l < call.num_scales; ++l) {
    Scale& scale = call.scales[l];
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t tile = int64_t{1} << tiling.log_size[axis];
      scale.reach[axis] = reach(call.full[axis], scale.size[axis], tile);
      scale.near[axis] = near(call.full[axis], scale.size[axis], tile);
    }
    scale.quads &= tiling.log_size[2] >= 2;
  }
}

// Split samples into items, as many as blocks run at once unless their buffers would be too large.
template <typename T>
void Prepared<T>::share_out(const Shape& shape, int64_t item_bytes, int64_t block_bytes) {
  Tiling& tiling = call.tiling;
  int64_t blocks = int64_t{shape.blocks} * device_.multiprocessors;
  blocks = std::clamp<int64_t>(kScratchBytes / std::max<int64_t>(block_bytes, 1), 1, blocks);
  const int64_t most = std::max<int64_t>(1, kSumBytes / std::max<int64_t>(item_bytes * call.batch, 1));
  // What the busiest block has to do, if samples are split into `wanted` chunks.
  const auto busiest = [&](int64_t wanted) {
    const int64_t tiles = ceil_div(tiling.per_sample, wanted);
    return ceil_div(call.batch * ceil_div(tiling.per_sample, tiles), blocks) * tiles;
  };
  int64_t best = 1;
  for (int64_t rounds = 1; rounds <= 4; ++rounds) {
    const int64_t wanted =
        std::clamp<int64_t>(rounds * blocks / call.batch, 1, std::min<int64_t>(most, tiling.per_sample));
    if (busiest(wanted) < busiest(best)) best = wanted;
  }
  tiling.chunk_tiles = static_cast<int>(ceil_div(tiling.per_sample, best));
  tiling.chunks = static_cast<int>(ceil_div(tiling.per_sample, tiling.chunk_tiles));
  tiling.items = call.batch * tiling.chunks;
  tiling.blocks = static_cast<int>(std::min<int64_t>(blocks, tiling.items));
}

// Tiles for one kernel, and what they take of a block's memory.
template <typename T>
Layout Prepared<T>::lay_out(const Shape& shape, int64_t most_shared) {
  Layout layout{shape};
  choose_tiles(shape, most_shared);
  layout.shared = shared_bytes<T>(shape, call.tiling.strips, length(), call.num_scales);
  layout.most_shared = device_.shared_per_block;
  layout.scratch = shape.scratch_fixed + call.tiling.strips * shape.scratch_per_strip;
  const int64_t classes = call.num_classes;
  call.padded = static_cast<int>(call.few ? ceil_div(classes, 4) * 4 : ceil_div(classes, kChunk) * kChunk);
  return layout;
}

// The class-tiled kernels keep little in shared memory, but a count a class they do.
static void check_shared(const Layout& layout, int64_t classes) {
  TORCH_CHECK_VALUE(layout.shared <= layout.most_shared, "logits: got ", classes, " classes, which take ",
                    layout.shared, " bytes of shared memory, expected so few that ", layout.most_shared,
                    " suffice, which is what this GPU has; use impl='eager'");
}

template <typename T>
Layout Prepared<T>::lay_out_forward() {
  const int64_t C = call.num_classes, L = call.num_scales, number = sizeof(T);
  const auto with = [&](bool few) {
    call.few = few;
    const Shape shape = forward_shape<T>(problem(few));
    // A block's share of a multiprocessor, of which CUDA keeps 1 KiB a block for itself.
    const int64_t share = device_.shared_per_multiprocessor / shape.blocks - 1024;
    return lay_out(shape, std::min({share, kMostShared, static_cast<int64_t>(device_.shared_per_block)}));
  };
  Layout layout = with(may_be_few<T>(C, L));
  if (layout.shared > device_.shared_per_block) layout = with(false);
  check_shared(layout, C);
  call.scratch_size = layout.scratch;
  share_out(layout.shape, call.num_maps * (1 + 2 * C) * number, layout.scratch * number);
  return layout;
}

template <typename T>
Layout Prepared<T>::lay_out_backward() {
  const int64_t C = call.num_classes, L = call.num_scales, number = sizeof(T);
  const auto with = [&](bool few) {
    call.few = few;
    return lay_out(backward_shape<T>(problem(few)), device_.shared_per_block);
  };
  Layout layout = with(may_be_few<T>(C, L));
  if (layout.shared > device_.shared_per_block) layout = with(false);
  check_shared(layout, C);
  const Tiling& tiling = call.tiling;
  const int64_t nz = 1 << tiling.log_size[0], ny = 1 << tiling.log_size[1];
  int64_t room = 0;
  for (int l = 0; l < call.num_scales; ++l) {
    Scale& scale = call.scales[l];
    if (!scale.used || scale.same) continue;
    const int64_t rz = scale.reach[0], ry = scale.reach[1], rx = scale.reach[2];
    room = std::max(room, C * nz * (ny + ry) * rx);
    scale.partial = layout.native_partial;
    layout.native_partial += call.batch * static_cast<int64_t>(tiling.per_sample) * C * rz * ry * rx;
  }
  call.room_in_shared = room <= layout.shape.room;
  call.warp_sums = static_cast<int>(layout.shape.warp_sums);
  if (!call.room_in_shared) layout.scratch += ceil_div(room, 32) * 32;  // the next block's rows are aligned
  call.scratch_size = layout.scratch;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(room <= kMost && call.num_pairs * (C + 1) * (C + 1) <= kMost && call.padded * C <= kMost,
                    "logits: got ", C, " classes in ", L,
                    " scales, of which one is much larger than the labels or all have "
                    "too many classes, expected what 2^31 numbers can hold for a tile; use impl='eager'");
  layout.most_products = call.learned ? call.num_pairs * (C + 1) * (C + 1) : 0;
  share_out(layout.shape, 0, std::max(layout.scratch, layout.most_products) * number);
  return layout;
}

template class Prepared<float>;
template class Prepared<double>;

}  // namespace lomix::cuda
