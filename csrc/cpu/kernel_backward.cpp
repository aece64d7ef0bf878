// Backward pass of one unit: maps made again, their gradients pushed through softmax, mix and interpolation.
#include "dispatch.h"
#include "softmax.h"
#include "sweep.h"
#include "unmix.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
struct BackwardState {
  Tile<T> tile;
  PerScale<RowReader<T>> readers;
  PerScale<RowWriter<T>> writers;
  BackwardState(const Problem<T>& problem, Arena& arena)
      : tile(problem, true, arena), readers(problem, arena), writers(problem, arena) {}
};

template <typename T>
int64_t backward_scratch(const Problem<T>& problem) {
  Arena arena(nullptr);
  BackwardState<T> state(problem, arena);
  return arena.used();
}

template <typename T>
void backward_unit(const Problem<T>& problem, const Unit& unit, void* scratch, const ParameterGrads& out) {
  Arena arena(scratch);
  BackwardState<T> state(problem, arena);
  Tile<T>& tile = state.tile;
  const int C = static_cast<int>(problem.num_classes);
  const int64_t period = log_period<T>(C);
  const T* grad_stats = problem.grad_stats + unit.batch * problem.num_maps * (1 + 2 * C);
  for (int64_t l = 0; l < problem.num_scales; ++l) {
    if (problem.scales[l].identity) continue;
    const int64_t rows = unit.native_nz[l] * unit.native_ny[l];
    std::memset(problem.native_grads + unit.native_offset[l], 0, sizeof(T) * rows * problem.scales[l].size[2] * C);
  }
  const auto start = [&](int64_t z) {
    for (int64_t l = 0; l < problem.num_scales; ++l) {
      state.readers[l].start(unit.batch, z);
      state.writers[l].start(unit, z);
    }
  };
  const auto fill = [&](const Segment& s) {
    for (int64_t l = 0; l < problem.num_scales; ++l) {
      state.readers[l].read(s.y, s.x, s.count, tile.scale(l, 0, C) + s.offset, tile.capacity);
    }
  };
  const auto work = [&] {
    std::memset(tile.grad_scales, 0, sizeof(T) * problem.num_scales * C * tile.capacity);
    for (int64_t m = 0; m < problem.num_maps; ++m) {
      const MapSpec& spec = problem.maps[m];
      const T* map = make_map(problem, tile, spec, C);
      exponentiate<T, false>(tile, map, C, period);
      softmax_gradient(tile, C, problem.squared, grad_stats + m * (1 + 2 * C));
      unmix(problem, tile, spec, C, out);
    }
  };
  const auto scatter = [&](const Segment& s) {
    for (int64_t l = 0; l < problem.num_scales; ++l) {
      state.writers[l].write(s.y, s.x, s.count, tile.grad_scale(l, 0, C) + s.offset, tile.capacity);
    }
  };
  const auto finish = [&] {
    for (int64_t l = 0; l < problem.num_scales; ++l) state.writers[l].finish();
  };
  sweep(problem, unit, tile, start, fill, work, scatter, finish);
}

}  // namespace CPU_CAPABILITY

void LOMIX_BACKWARD_TABLE(Kernels<float>& f32, Kernels<double>& f64) {
  f32.backward_scratch = backward_scratch<float>;
  f32.backward = backward_unit<float>;
  f64.backward_scratch = backward_scratch<double>;
  f64.backward = backward_unit<double>;
}

}  // namespace lomix::cpu
