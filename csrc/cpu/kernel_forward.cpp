// Forward pass of one unit: every map of the plan made, exponentiated and summed, tile by tile.
#include "dispatch.h"
#include "mix.h"
#include "statistics.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kPartRows = 4;

template <typename T>
struct ForwardState {
  Tile<T> tile;
  PerScale<ScaleRows<T>> rows;
  T* sums;    // [M] of MapSums
  T* labels;  // [C] vectors, how many pixels have each label
  ForwardState(const Problem<T>& problem, Arena& arena)
      : tile(problem, arena),
        rows(problem, arena),
        sums(arena.take<T>(problem.num_maps * MapSums<T>::size(problem.num_classes))),
        labels(arena.take_zeros<T>(problem.num_classes * kWidth<T>)) {}
};

template <typename T>
int64_t forward_scratch(const Problem<T>& problem) {
  Arena arena(nullptr);
  ForwardState<T> state(problem, arena);
  return arena.used();
}

template <typename T>
void forward_part(const Problem<T>& problem, ForwardState<T>& state, const Tile<T>& tile) {
  const auto add = [&](int map, const Tile<T>& made, bool small_sums) {
    const MapSums<T> sums{state.sums + map * MapSums<T>::size(problem.num_classes)};
    add_statistics(made, problem.squared, small_sums, sums);
  };
  for (int l = 0; l < problem.num_scales; ++l) {
    if (!problem.scales[l].used) continue;
    load_scale(tile, state.rows[l], l);
    load_own(tile, l);
    if (problem.original[l] < 0 && !problem.has_add) continue;
    const Tile<T> made = exponentiate_scale<Pass::kForward>(tile, l);
    if (problem.original[l] >= 0) add(problem.original[l], made, false);
  }
  // One operator after the other: what the maps of one operator read fits the first-level cache better than all of it.
  const auto for_maps = [&](Operator op, const auto& make) {
    for (int64_t i = 0; i < problem.num_subsets; ++i) {
      const int map = problem.subsets[i].of(op);
      if (map < 0) continue;
      make(problem.subsets[i]);
      add(map, tile, op == Operator::kAdd);
    }
  };
  for_maps(Operator::kAdd, [&](const Subset& subset) { make_add<Pass::kForward>(tile, subset.members, subset.size); });
  for_maps(Operator::kMul, [&](const Subset& subset) { make_mul<Pass::kForward>(tile, subset); });
  for_maps(Operator::kAwf,
           [&](const Subset& subset) { make_awf<Pass::kForward>(tile, subset, problem.awf_bias, state.rows); });
}

template <typename T>
void forward_cat(const Problem<T>& problem, ForwardState<T>& state, const Tile<T>& tile) {
  for (int64_t i = 0; i < problem.num_subsets; ++i) {
    const int map = problem.subsets[i].of(Operator::kCat);
    if (map < 0) continue;
    make_cat<Pass::kForward>(tile, problem.subsets[i], problem.cat_bias, state.rows);
    const MapSums<T> sums{state.sums + map * MapSums<T>::size(problem.num_classes)};
    add_statistics(tile, problem.squared, false, sums);
  }
}

template <typename T>
void forward_unit(const Problem<T>& problem, const Unit& unit, void* scratch, const StatsOut& out) {
  const FlushSubnormals flush;
  Arena arena(scratch);
  ForwardState<T> state(problem, arena);
  const int64_t C = problem.num_classes;
  const auto each_map = [&](const auto& f) {
    for (int64_t m = 0; m < problem.num_maps; ++m) f(MapSums<T>{state.sums + m * MapSums<T>::size(C)}, m);
  };
  int64_t additions = 0;
  const auto drain = [&] {
    each_map([&](const MapSums<T>& sums, int64_t m) { sums.drain(C, out.stats + m * (1 + 2 * C)); });
    for (int64_t c = 0; c < C; ++c) {
      out.label_counts[c] += static_cast<int64_t>(horizontal_sum(Vec<T>::loadu(state.labels + c * kWidth<T>)));
    }
    std::memset(state.labels, 0, sizeof(T) * C * kWidth<T>);
    additions = 0;
  };
  const auto start = [&](int64_t z, int64_t x, int64_t tiles) {
    for (int64_t l = 0; l < problem.num_scales; ++l) state.rows[l].start(unit.batch, z, x, tiles);
  };
  const auto group = [&](int64_t y, int64_t y_end) {
    for (int64_t l = 0; l < problem.num_scales; ++l) {
      state.rows[l].ensure(y, y_end, [](int64_t, int64_t) {}, [](int64_t) {});
    }
  };
  const auto work = [&] {
    const Tile<T>& tile = state.tile;
    for (int64_t c = 0; c < C; ++c) {
      Vec<T> count = Vec<T>::loadu(state.labels + c * kWidth<T>);
      for (int64_t p = 0, end = tile.pixels(); p < end; p += kWidth<T>) {
        count = count + Vec<T>::loadu(tile.one_hot + c * kTilePixels + p);
      }
      count.store(state.labels + c * kWidth<T>);
    }
    for (int64_t r = 0; r < tile.rows; r += kPartRows) {
      forward_part(problem, state, tile.part(r, tile.rows - r < kPartRows ? tile.rows - r : kPartRows));
    }
    forward_cat(problem, state, tile);
    additions += tile.rows * tile.columns;
    if (additions >= kMostAdditions) drain();
  };
  each_map([&](const MapSums<T>& sums, int64_t) { sums.clear(C); });
  sweep(problem, unit, state.tile, state.rows, start, group, work, [] {});
  drain();
}

}  // namespace CPU_CAPABILITY

void LOMIX_FORWARD_TABLE(Kernels<float>& f32, Kernels<double>& f64) {
  f32.forward_scratch = forward_scratch<float>;
  f32.forward = forward_unit<float>;
  f64.forward_scratch = forward_scratch<double>;
  f64.forward = forward_unit<double>;
}

}  // namespace lomix::cpu
