// Backward pass of one unit: maps made again, their gradients pushed through softmax, mix and interpolation.
#include "dispatch.h"
#include "unmix.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
struct BackwardState {
  Tile<T> tile;
  PerScale<RowGrads<T>> rows;
  SubsetGrads<T> grads;
  BackwardState(const Problem<T>& problem, Arena& arena) : tile(problem, arena), rows(problem, arena) {
    const int64_t L = problem.num_scales, map = problem.num_classes * kTilePixels;
    grads = {arena.take<T>(map),     arena.take<T>(map),
             arena.take<T>(map),     arena.take<T>(map),
             arena.take<T>(L * kTilePixels), arena.take<T>(L * map)};
  }
};

template <typename T>
int64_t backward_scratch(const Problem<T>& problem) {
  Arena arena(nullptr);
  BackwardState<T> state(problem, arena);
  return arena.used();
}

template <int kC, typename T>
void backward_tile(const Problem<T>& problem, BackwardState<T>& state, const T* grad_stats) {
  const Tile<T>& tile = state.tile;
  const int64_t C = problem.num_classes, map_size = C * kTilePixels;
  const auto differentiate = [&](int map, const auto& source, T* to) {
    softmax_gradient<kC>(tile, source, problem.squared, grad_stats + map * (1 + 2 * C), to);
    return to;
  };
  for (int l = 0; l < problem.num_scales; ++l) {
    if (!problem.scales[l].used) continue;
    T* to = state.grads.scales + l * map_size;
    load_own(tile, l);
    if (problem.original[l] >= 0 || problem.has_add) exponentiate_scale<kC>(tile, l);
    if (problem.original[l] >= 0) {
      differentiate(problem.original[l], AddSource<T>(tile, &l, 1), to);
    } else {
      std::memset(to, 0, sizeof(T) * map_size);
    }
  }
  for (int64_t i = 0; i < problem.num_subsets; ++i) {
    const Subset& subset = problem.subsets[i];
    const int of_add = subset.of(Operator::kAdd), of_mul = subset.of(Operator::kMul);
    const int of_cat = subset.of(Operator::kCat), of_awf = subset.of(Operator::kAwf);
    SubsetGrads<T> grads{nullptr, nullptr, nullptr, nullptr, state.grads.score, state.grads.scales};
    if (of_add >= 0) {
      grads.add = differentiate(of_add, AddSource<T>(tile, subset.members, subset.size), state.grads.add);
    }
    if (of_mul >= 0) grads.mul = differentiate(of_mul, MulSource<T>(tile, subset), state.grads.mul);
    if (of_cat >= 0) {
      const CatSource<T, RowGrads<T>> source(tile, subset, problem.cat_bias, state.rows);
      grads.cat = differentiate(of_cat, source, state.grads.cat);
    }
    if (of_awf >= 0) {
      attend(tile, subset, problem.awf_bias, state.rows);
      grads.awf = differentiate(of_awf, AwfSource<T>(tile, subset), state.grads.awf);
    }
    unmix_subset(tile, subset, grads);
    unmix_projected(tile, subset, grads, state.rows);
  }
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    if (problem.scales[l].used) state.rows[l].spread_raw(tile, state.grads.scales + l * map_size);
  }
}

template <int kC, typename T>
void backward_unit_of(const Problem<T>& problem, const Unit& unit, void* scratch, const ProjectionGrads& out) {
  const FlushSubnormals flush;
  Arena arena(scratch);
  BackwardState<T> state(problem, arena);
  const int64_t L = problem.num_scales, C = problem.num_classes;
  const T* grad_stats = problem.grad_stats + unit.batch * problem.num_maps * (1 + 2 * C);
  for (int64_t l = 0; l < L; ++l) {
    if (!problem.scales[l].used || problem.scales[l].identity) continue;
    const int64_t rows = unit.native_nz[l] * unit.native_ny[l];
    std::memset(problem.native_grads + unit.native_offset[l], 0, sizeof(T) * rows * problem.scales[l].size[2] * C);
  }
  const auto start = [&](int64_t z, int64_t x, int64_t tiles) {
    for (int64_t l = 0; l < L; ++l) state.rows[l].start(unit, z, x, tiles);
  };
  const auto group = [&](int64_t y, int64_t y_end) {
    for (int64_t l = 0; l < L; ++l) state.rows[l].ensure(y, y_end);
  };
  const auto work = [&] { backward_tile<kC>(problem, state, grad_stats); };
  const auto finish = [&] {
    for (int64_t l = 0; l < L; ++l) state.rows[l].finish();
  };
  sweep(problem, unit, state.tile, state.rows, start, group, work, finish);
  for (int64_t l = 0; l < L; ++l) state.rows[l].drain(out.scale[l]);
}

template <typename T>
void backward_unit(const Problem<T>& problem, const Unit& unit, void* scratch, const ProjectionGrads& out) {
  with_class_count<T>(problem.num_classes,
                      [&]<int kC>() { backward_unit_of<kC>(problem, unit, scratch, out); });
}

}  // namespace CPU_CAPABILITY

void LOMIX_BACKWARD_TABLE(Kernels<float>& f32, Kernels<double>& f64) {
  f32.backward_scratch = backward_scratch<float>;
  f32.backward = backward_unit<float>;
  f64.backward_scratch = backward_scratch<double>;
  f64.backward = backward_unit<double>;
}

}  // namespace lomix::cpu
