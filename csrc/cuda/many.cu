// The class-tiled kernels, and the choice between them and those for few classes.
#include <utility>

#include "launch.cuh"
#include "many_backward.cuh"
#include "many_forward.cuh"

namespace lomix::cuda {
namespace {

// Calls f with the number of classes as a constant.
template <typename F, int... kBelow>
cudaError_t with_classes(int classes, const F& f, std::integer_sequence<int, kBelow...>) {
  cudaError_t error = cudaErrorInvalidValue;
  (void)((classes == kBelow + 1 && (error = f(std::integral_constant<int, kBelow + 1>()), true)) || ...);
  return error;
}

}  // namespace

template <typename T>
cudaError_t launch_statistics(const Call<T>& call, Memory memory, cudaStream_t stream) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (call.few) {
      return with_classes(
          call.num_classes,
          [&](auto c) {
            return call.general ? launch_statistics_few<c(), true>(call, memory, stream)
                                : launch_statistics_few<c(), false>(call, memory, stream);
          },
          std::make_integer_sequence<int, kMostFew>());
    }
  }
  return launch(statistics_many<T>, dim3(static_cast<unsigned>(call.tiling.blocks)), kManyThreads, memory, stream,
                call);
}

template <typename T>
cudaError_t launch_gradients(const Call<T>& call, Memory memory, cudaStream_t stream) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (call.few) {
      return with_classes(
          call.num_classes,
          [&](auto c) {
            return call.general ? launch_gradients_few<c(), true>(call, memory, stream)
                                : launch_gradients_few<c(), false>(call, memory, stream);
          },
          std::make_integer_sequence<int, kMostFew>());
    }
  }
  return launch(gradients_many<T>, dim3(static_cast<unsigned>(call.tiling.blocks)), kManyThreads, memory, stream, call);
}

template cudaError_t launch_statistics(const Call<float>&, Memory, cudaStream_t);
template cudaError_t launch_statistics(const Call<double>&, Memory, cudaStream_t);
template cudaError_t launch_gradients(const Call<float>&, Memory, cudaStream_t);
template cudaError_t launch_gradients(const Call<double>&, Memory, cudaStream_t);

}  // namespace lomix::cuda
