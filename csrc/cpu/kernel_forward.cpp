// Forward pass of one unit: every map of the plan made, exponentiated and summed, tile by tile.
#include "dispatch.h"
#include "mix.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// Additions of floats into one lane before they are carried over to doubles.
constexpr int64_t kMostAdditions = 1024;

template <typename T>
struct ForwardState {
  Tile<T> tile;
  PerScale<ScaleRows<T>> rows;
  T* sums;  // [M] of MapSums
  ForwardState(const Problem<T>& problem, Arena& arena)
      : tile(problem, arena),
        rows(problem, arena),
        sums(arena.take<T>(problem.num_maps * MapSums<T>::size(problem.num_classes))) {}
};

template <typename T>
int64_t forward_scratch(const Problem<T>& problem) {
  Arena arena(nullptr);
  ForwardState<T> state(problem, arena);
  return arena.used();
}

template <int kC, typename T>
void forward_tile(const Problem<T>& problem, ForwardState<T>& state) {
  const Tile<T>& tile = state.tile;
  const auto sums = [&](int map) { return MapSums<T>{state.sums + map * MapSums<T>::size(problem.num_classes)}; };
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    if (!problem.scales[l].used) continue;
    load_own(tile, l);
    if (problem.original[l] < 0 && !problem.has_add) continue;
    const MapInput<T> in = exponentiate_scale(tile, l);
    if (problem.original[l] < 0) continue;
    add_statistics<kC, From::kExponentials>(tile, in, problem.squared, sums(problem.original[l]));
  }
  for (int64_t i = 0; i < problem.num_subsets; ++i) {
    const Subset& subset = problem.subsets[i];
    with_size(subset.size, [&]<int kSize>() {
      const auto add = [&]<From kFrom>(Operator op, const MapInput<T>& in) {
        add_statistics<kC, kFrom>(tile, in, problem.squared, sums(subset.of(op)));
      };
      if (subset.of(Operator::kAdd) >= 0) {
        add.template operator()<From::kExponentials>(Operator::kAdd, make_add<T, kSize>(tile, subset));
      }
      if (subset.of(Operator::kMul) >= 0) {
        add.template operator()<From::kLogits>(Operator::kMul, make_mul<T, kSize>(tile, subset));
      }
      if (subset.of(Operator::kCat) >= 0) {
        add.template operator()<From::kLogits>(Operator::kCat,
                                               make_cat<T, kSize>(tile, subset, problem.cat_bias, state.rows));
      }
      if (subset.of(Operator::kAwf) >= 0) {
        add.template operator()<From::kLogits>(Operator::kAwf,
                                               make_awf<T, kSize>(tile, subset, problem.awf_bias, state.rows));
      }
    });
  }
}

template <int kC, typename T>
void forward_unit_of(const Problem<T>& problem, const Unit& unit, void* scratch, const StatsOut& out) {
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
      Vec<T> count(0);
      for (int64_t p = 0; p < tile.pixels(); p += kWidth<T>) {
        count = count + Vec<T>::loadu(tile.one_hot + c * kTilePixels + p);
      }
      out.label_counts[c] += static_cast<int64_t>(horizontal_sum(count));
    }
    forward_tile<kC>(problem, state);
    additions += tile.rows * tile.columns;
    if (additions >= kMostAdditions) drain();
  };
  each_map([&](const MapSums<T>& sums, int64_t) { sums.clear(C); });
  sweep(problem, unit, state.tile, state.rows, start, group, work, [] {});
  drain();
}

template <typename T>
void forward_unit(const Problem<T>& problem, const Unit& unit, void* scratch, const StatsOut& out) {
  with_class_count<T>(problem.num_classes,
                      [&]<int kC>() { forward_unit_of<kC>(problem, unit, scratch, out); });
}

}  // namespace CPU_CAPABILITY

void LOMIX_FORWARD_TABLE(Kernels<float>& f32, Kernels<double>& f64) {
  f32.forward_scratch = forward_scratch<float>;
  f32.forward = forward_unit<float>;
  f64.forward_scratch = forward_scratch<double>;
  f64.forward = forward_unit<double>;
}

}  // namespace lomix::cpu
