// Forward pass of one unit: labels and scales into a tile, every map of the plan made, exponentiated and summed there.
#include "dispatch.h"
#include "softmax.h"
#include "sweep.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
struct ForwardState {
  Tile<T> tile;
  PerScale<RowReader<T>> readers;
  ForwardState(const Problem<T>& problem, Arena& arena) : tile(problem, false, arena), readers(problem, arena) {}
};

template <typename T>
int64_t forward_scratch(const Problem<T>& problem) {
  Arena arena(nullptr);
  ForwardState<T> state(problem, arena);
  return arena.used();
}

template <typename T>
void forward_unit(const Problem<T>& problem, const Unit& unit, void* scratch, const StatsOut& out) {
  Arena arena(scratch);
  ForwardState<T> state(problem, arena);
  Tile<T>& tile = state.tile;
  const int C = static_cast<int>(problem.num_classes);
  const int64_t period = log_period<T>(C);
  const auto start = [&](int64_t z) {
    for (int64_t l = 0; l < problem.num_scales; ++l) state.readers[l].start(unit.batch, z);
  };
  const auto fill = [&](const Segment& s) {
    for (int64_t l = 0; l < problem.num_scales; ++l) {
      state.readers[l].read(s.y, s.x, s.count, tile.scale(l, 0, C) + s.offset, tile.capacity);
    }
  };
  const auto work = [&] {
    for (int c = 0; c < C; ++c) {
      int64_t labelled = 0;
      for (int64_t p = 0; p < tile.count; ++p) labelled += tile.label_mask[c * tile.capacity + p] != T(0);
      out.label_counts[c] += labelled;
    }
    for (int64_t m = 0; m < problem.num_maps; ++m) {
      double* stats = out.stats + m * (1 + 2 * C);
      const T* map = make_map(problem, tile, problem.maps[m], C);
      stats[0] += exponentiate<T, true>(tile, map, C, period);
      accumulate_dice(tile, C, problem.squared, stats);
    }
  };
  sweep(problem, unit, tile, start, fill, work, [](const Segment&) {}, [] {});
}

}  // namespace CPU_CAPABILITY

void LOMIX_FORWARD_TABLE(Kernels<float>& f32, Kernels<double>& f64) {
  f32.forward_scratch = forward_scratch<float>;
  f32.forward = forward_unit<float>;
  f64.forward_scratch = forward_scratch<double>;
  f64.forward = forward_unit<double>;
}

}  // namespace lomix::cpu
