// Forward pass of some units: every map of the plan made, exponentiated and summed, tile by tile.
#include "dispatch.h"
#include "extras.h"
#include "sigmoid.h"
#include "statistics.h"
#include "targets.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kPartRows = 4;

template <typename T>
struct ForwardState {
  Tile<T> tile;
  PerScale<ScaleRows<T>> rows;
  T* sums;    // [M] of MapSums
  T* counts;  // [1 + C] vectors, what recipes need to know of the target
  ForwardState(const Problem<T>& problem, Arena& arena)
      : tile(problem, arena),
        rows(problem, arena),
        sums(arena.take<T>(problem.num_maps * MapSums<T>::size(problem.num_classes))),
        counts(arena.take_zeros<T>((1 + problem.num_classes) * kWidth<T>)) {}
};

template <typename T>
int64_t forward_scratch(const Problem<T>& problem) {
  Arena arena(nullptr);
  ForwardState<T> state(problem, arena);
  return arena.used();
}

template <Kind kKind>
inline constexpr Pass forward_pass_of = kKind == Kind::kPlain     ? Pass::kForward
                                        : kKind == Kind::kSoftmax ? Pass::kBackward
                                                                  : Pass::kBare;

// The sums of the map whose logits are in the tile.
template <Kind kKind, typename T>
void add_map(const Problem<T>& problem, const Tile<T>& tile, const MapSums<T>& sums) {
  if constexpr (kKind == Kind::kSigmoid) {
    add_sigmoid_statistics(problem, tile, sums);
  } else {
    exponentiate<kKind == Kind::kSoftmax>(tile);
    add_statistics<kKind>(problem, tile, false, sums);
  }
}

template <Kind kKind, typename T>
void forward_part(const Problem<T>& problem, ForwardState<T>& state, const Tile<T>& tile) {
  constexpr bool kPlain = kKind == Kind::kPlain, kSigmoid = kKind == Kind::kSigmoid;
  constexpr Pass kPass = forward_pass_of<kKind>;
  const auto sums_of = [&](int map) { return MapSums<T>{state.sums + map * MapSums<T>::size(problem.num_classes)}; };
  for (int l = 0; l < problem.num_scales; ++l) {
    if (!problem.scales[l].used) continue;
    load_scale(tile, state.rows[l], l);
    if constexpr (kPlain) load_own(tile, l);
    if (!kPlain && problem.bounded) bound_scale(tile, l);
    const int original = problem.original[l];
    if constexpr (kSigmoid) {
      if (original < 0) continue;
      make_simple<kPass>(tile, Operator::kAdd, &l, 1);
      add_map<kKind>(problem, tile, sums_of(original));
    } else {
      if (original < 0 && !problem.has_add) continue;
      const Tile<T> made = exponentiate_scale<kKind, Pass::kForward>(tile, l);
      if (original >= 0) add_statistics<kKind>(problem, made, false, sums_of(original));
    }
  }
  // One operator after the other: what the maps of one operator read fits the first-level cache better than all of it.
  const auto for_maps = [&](Operator op, const auto& make) {
    for (int64_t i = 0; i < problem.num_subsets; ++i) {
      const int map = problem.subsets[i].of(op);
      if (map < 0) continue;
      make(problem.subsets[i]);
      if (!kSigmoid && op == Operator::kAdd) {
        add_statistics<kKind>(problem, tile, true, sums_of(map));
      } else {
        add_map<kKind>(problem, tile, sums_of(map));
      }
    }
  };
  const auto simple = [&](Operator op) {
    for_maps(op, [&](const Subset& subset) { make_simple<kPass>(tile, op, subset.members, subset.size); });
  };
  if constexpr (kSigmoid) {
    simple(Operator::kAdd);
  } else {
    for_maps(Operator::kAdd,
             [&](const Subset& subset) { make_add<Pass::kForward>(tile, subset.members, subset.size); });
  }
  for_maps(Operator::kMul, [&](const Subset& subset) { make_mul<kPass>(tile, subset); });
  for_maps(Operator::kAwf, [&](const Subset& subset) { make_awf<kPass>(tile, subset, problem.awf_bias, state.rows); });
  if constexpr (!kPlain) {
    for (const Operator op : {Operator::kSub, Operator::kAvg, Operator::kMax}) simple(op);
  }
}

template <Kind kKind, typename T>
void forward_cat(const Problem<T>& problem, ForwardState<T>& state, const Tile<T>& tile) {
  for (int64_t i = 0; i < problem.num_subsets; ++i) {
    const int map = problem.subsets[i].of(Operator::kCat);
    if (map < 0) continue;
    make_cat<forward_pass_of<kKind>>(tile, problem.subsets[i], problem.cat_bias, state.rows);
    add_map<kKind>(problem, tile, MapSums<T>{state.sums + map * MapSums<T>::size(problem.num_classes)});
  }
}

template <Kind kKind, typename T>
void forward_kind(const Problem<T>& problem, int64_t first, int64_t last, void* scratch, const StatsOut& out) {
  Arena arena(scratch);
  ForwardState<T> state(problem, arena);
  const int64_t C = problem.num_classes;
  const auto each_map = [&](const auto& f) {
    for (int64_t m = 0; m < problem.num_maps; ++m) f(MapSums<T>{state.sums + m * MapSums<T>::size(C)}, m);
  };
  int64_t additions = 0, number = first;
  const auto drain = [&] {
    double* const stats = out.stats + (number - first) * out.apart;
    double* const counts = stats + problem.num_maps * (1 + 2 * C);
    each_map([&](const MapSums<T>& sums, int64_t m) { sums.drain(C, stats + m * (1 + 2 * C)); });
    for (int64_t c = 0; c <= C; ++c) counts[c] += horizontal_sum(Vec<T>::loadu(state.counts + c * kWidth<T>));
    std::memset(state.counts, 0, sizeof(T) * (1 + C) * kWidth<T>);
    additions = 0;
  };
  const auto start = [&](int64_t z, int64_t x, int64_t tiles) {
    for (int64_t l = 0; l < problem.num_scales; ++l) state.rows[l].start(problem.units[number].batch, z, x, tiles);
  };
  const auto group = [&](int64_t y, int64_t y_end) {
    for (int64_t l = 0; l < problem.num_scales; ++l) {
      state.rows[l].ensure(y, y_end, [](int64_t, int64_t) {}, [](int64_t) {});
    }
  };
  const auto work = [&](const Place& at) {
    Tile<T>& tile = state.tile;
    load_target<kKind>(problem, tile, at, state.counts);
    for (int64_t r = 0; r < tile.rows; r += kPartRows) {
      forward_part<kKind>(problem, state, tile.part(r, tile.rows - r < kPartRows ? tile.rows - r : kPartRows));
    }
    forward_cat<kKind>(problem, state, tile);
    additions += tile.rows * tile.columns;
    if (additions >= kMostAdditions) drain();
  };
  each_map([&](const MapSums<T>& sums, int64_t) { sums.clear(C); });
  for (; number < last; ++number) {
    sweep(problem, problem.units[number], state.tile, state.rows, start, group, work, [] {});
    drain();
  }
}

template <typename T>
void forward_units(const Problem<T>& problem, int64_t first, int64_t last, void* scratch, const StatsOut& out) {
  const FlushSubnormals flush;
  switch (problem.kind) {
    case Kind::kPlain: return forward_kind<Kind::kPlain>(problem, first, last, scratch, out);
    case Kind::kSoftmax: return forward_kind<Kind::kSoftmax>(problem, first, last, scratch, out);
    case Kind::kSigmoid: return forward_kind<Kind::kSigmoid>(problem, first, last, scratch, out);
  }
}

}  // namespace CPU_CAPABILITY

void LOMIX_FORWARD_TABLE(Kernels<float>& f32, Kernels<double>& f64) {
  f32.forward_scratch = forward_scratch<float>;
  f32.forward = forward_units<float>;
  f64.forward_scratch = forward_scratch<double>;
  f64.forward = forward_units<double>;
}

}  // namespace lomix::cpu
