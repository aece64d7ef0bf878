// Backward pass of some units: maps made again, their gradients pushed through softmax, mix and interpolation.
#include "dispatch.h"
#include "extras.h"
#include "sigmoid.h"
#include "targets.h"
#include "unmix.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Rows of a tile that the maps of add, mul and awf are made of at a time: what they and their gradients touch then fits
// the first-level cache.
constexpr int64_t kPartRows = 2;

template <typename T>
struct BackwardState {
  Tile<T> tile;
  PerScale<RowGrads<T>> rows;
  SubsetGrads<T> grads;
  BackwardState(const Problem<T>& problem, Arena& arena) : tile(problem, arena), rows(problem, arena) {
    const int64_t map = problem.num_classes * kTilePixels;
    grads.add = arena.take<T>(map);
    grads.mul = arena.take<T>(map);
    grads.awf = arena.take<T>(map);
    grads.cat = arena.take<T>(map);
    grads.scores = arena.take<T>(problem.num_pairs * kTilePixels);
    grads.scales = arena.take<T>(problem.num_scales * map);
  }
};

template <typename T>
int64_t backward_scratch(const Problem<T>& problem) {
  Arena arena(nullptr);
  BackwardState<T> state(problem, arena);
  return arena.used();
}

template <Kind kKind>
inline constexpr Pass backward_pass_of = kKind == Kind::kSigmoid ? Pass::kBare : Pass::kBackward;

// dLoss/dmap of the map whose logits are in the tile, or whose exponentials if kMade, to [C, kTilePixels].
template <Kind kKind, bool kMade, typename T>
void differentiate(const Problem<T>& problem, const Tile<T>& tile, const T* grad, T* to) {
  if constexpr (kKind == Kind::kSigmoid) {
    push_sigmoid_gradient(tile, problem.squared, grad, to);
  } else {
    if constexpr (!kMade) exponentiate<false>(tile);
    push_gradient<kKind>(tile, problem.squared, grad, to);
  }
}

// The same of a scale by itself; also makes ready what sums of scales are made of.
template <Kind kKind, typename T>
void differentiate_scale(const Problem<T>& problem, const Tile<T>& tile, int l, const T* grad, T* to) {
  if constexpr (kKind == Kind::kSigmoid) {
    if (grad == nullptr) return;
    make_simple<backward_pass_of<kKind>>(tile, Operator::kAdd, &l, 1);
    differentiate<kKind, false>(problem, tile, grad, to);
  } else {
    if (grad == nullptr && !problem.has_add) return;
    const Tile<T> made = exponentiate_scale<kKind, Pass::kBackward>(tile, l);
    if (grad != nullptr) differentiate<kKind, true>(problem, made, grad, to);
  }
}

// Gradients of the originals and of all maps but those of cat, to their members and to the attention scores.
template <Kind kKind, typename T>
void backward_pixels(const Problem<T>& problem, const Tile<T>& tile, const SubsetGrads<T>& to, const T* grad_stats,
                     PerScale<RowGrads<T>>& rows) {
  const int64_t C = problem.num_classes, map_size = C * kTilePixels;
  const auto pull_of = [&](int map) { return grad_stats + map * (1 + 2 * C); };
  for (int l = 0; l < problem.num_scales; ++l) {
    if (!problem.scales[l].used) continue;
    T* grad = to.scales + l * map_size;
    load_scale(tile, rows[l], l);
    if (kKind != Kind::kPlain && problem.bounded) bound_scale(tile, l);
    const int original = problem.original[l];
    differentiate_scale<kKind>(problem, tile, l, original < 0 ? nullptr : pull_of(original), grad);
    for (int64_t c = 0; original < 0 && c < C; ++c) std::memset(grad + c * kTilePixels, 0, sizeof(T) * tile.pixels());
  }
  for (int64_t i = 0; i < problem.num_subsets; ++i) {
    const Subset& subset = problem.subsets[i];
    SubsetGrads<T> grads = to;
    const auto unless_none = [&](Operator op, T*& at, const auto& make) {
      if (subset.of(op) < 0) {
        at = nullptr;
      } else {
        make(pull_of(subset.of(op)), at);
      }
    };
    if constexpr (kKind != Kind::kPlain) {
      for (const Operator op : {Operator::kSub, Operator::kAvg, Operator::kMax}) {
        if (subset.of(op) < 0) continue;
        make_simple<backward_pass_of<kKind>>(tile, op, subset.members, subset.size);
        differentiate<kKind, false>(problem, tile, pull_of(subset.of(op)), to.add);
        unmix_simple(tile, op, subset.members, subset.size, to.add, to.scales);
      }
    }
    unless_none(Operator::kAdd, grads.add, [&](const T* pull, T* at) {
      if constexpr (kKind == Kind::kSigmoid) {
        make_simple<backward_pass_of<kKind>>(tile, Operator::kAdd, subset.members, subset.size);
      } else {
        make_add<Pass::kBackward>(tile, subset.members, subset.size);
      }
      differentiate<kKind, true>(problem, tile, pull, at);
    });
    unless_none(Operator::kMul, grads.mul, [&](const T* pull, T* at) {
      make_mul<backward_pass_of<kKind>>(tile, subset);
      differentiate<kKind, false>(problem, tile, pull, at);
    });
    unless_none(Operator::kAwf, grads.awf, [&](const T* pull, T* at) {
      make_awf<backward_pass_of<kKind>>(tile, subset, problem.awf_bias, rows);
      differentiate<kKind, false>(problem, tile, pull, at);
    });
    if (grads.add != nullptr || grads.mul != nullptr || grads.awf != nullptr) unmix_subset(tile, subset, grads);
  }
}

template <Kind kKind, typename T>
void backward_tile(const Problem<T>& problem, BackwardState<T>& state, const T* grad_stats) {
  const Tile<T>& tile = state.tile;
  const SubsetGrads<T>& grads = state.grads;
  const int64_t C = problem.num_classes;
  // 1. what is made from pixels
  for (int64_t r = 0; r < tile.rows; r += kPartRows) {
    const Tile<T> part = tile.part(r, tile.rows - r < kPartRows ? tile.rows - r : kPartRows);
    SubsetGrads<T> to = grads;
    to.scores += tile.offset(r);
    to.scales += tile.offset(r);
    backward_pixels<kKind>(problem, part, to, grad_stats, state.rows);
  }
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    if (problem.scales[l].used) state.rows[l].spread_raw(tile, grads.scales + l * C * kTilePixels);
  }
  // 2. what is made from projections of native rows
  for (int64_t i = 0; i < problem.num_subsets; ++i) {
    const Subset& subset = problem.subsets[i];
    const int cat = subset.of(Operator::kCat);
    if (cat >= 0) {
      make_cat<backward_pass_of<kKind>>(tile, subset, problem.cat_bias, state.rows);
      differentiate<kKind, false>(problem, tile, grad_stats + cat * (1 + 2 * C), grads.cat);
    }
    for (int j = 0; j < subset.size; ++j) {
      const RowGrads<T>& to = state.rows[subset.members[j]];
      if (cat >= 0) to.spread_projected(tile, grads.cat, subset.cat_row[j], C);
      if (subset.awf_row[j] < 0) continue;
      to.spread_projected(tile, grads.scores + (subset.first_pair + j) * kTilePixels, subset.awf_row[j], 1);
    }
  }
}

template <Kind kKind, typename T>
void backward_kind(const Problem<T>& problem, int64_t first, int64_t last, void* scratch, const ProjectionGrads& out) {
  Arena arena(scratch);
  BackwardState<T> state(problem, arena);
  const int64_t L = problem.num_scales, C = problem.num_classes;
  const Unit* unit = problem.units + first;
  const auto start = [&](int64_t z, int64_t x, int64_t tiles) {
    for (int64_t l = 0; l < L; ++l) state.rows[l].start(*unit, z, x, tiles, out.scale[l]);
  };
  const auto group = [&](int64_t y, int64_t y_end) {
    for (int64_t l = 0; l < L; ++l) state.rows[l].ensure(y, y_end);
  };
  const auto work = [&](const Place& at) {
    load_target<kKind, T>(problem, state.tile, at, nullptr);
    backward_tile<kKind>(problem, state, problem.grad_stats + unit->batch * problem.num_maps * (1 + 2 * C));
  };
  const auto finish = [&] {
    for (int64_t l = 0; l < L; ++l) state.rows[l].finish();
  };
  for (; unit != problem.units + last; ++unit) {
    for (int64_t l = 0; l < L; ++l) {
      const Scale<T>& scale = problem.scales[l];
      if (!scale.used || scale.identity) continue;
      const int64_t rows = unit->native_nz[l] * unit->native_ny[l];
      std::memset(problem.native_grads + unit->native_offset[l], 0, sizeof(T) * rows * scale.axis[2].kept * C);
    }
    sweep(problem, *unit, state.tile, state.rows, start, group, work, finish);
  }
  for (int64_t l = 0; l < L; ++l) state.rows[l].drain();
}

template <typename T>
void backward_units(const Problem<T>& problem, int64_t first, int64_t last, void* scratch, const ProjectionGrads& out) {
  const FlushSubnormals flush;
  switch (problem.kind) {
    case Kind::kPlain: return backward_kind<Kind::kPlain>(problem, first, last, scratch, out);
    case Kind::kSoftmax: return backward_kind<Kind::kSoftmax>(problem, first, last, scratch, out);
    case Kind::kSigmoid: return backward_kind<Kind::kSigmoid>(problem, first, last, scratch, out);
  }
}

}  // namespace CPU_CAPABILITY

void LOMIX_BACKWARD_TABLE(Kernels<float>& f32, Kernels<double>& f64) {
  f32.backward_scratch = backward_scratch<float>;
  f32.backward = backward_units<float>;
  f64.backward_scratch = backward_scratch<double>;
  f64.backward = backward_units<double>;
}

}  // namespace lomix::cpu
