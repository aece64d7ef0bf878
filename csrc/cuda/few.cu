// The kernels for one number of classes; built once for each LOMIX_CLASSES from 1 to kMostFew.
#include "few_backward.cuh"
#include "few_forward.cuh"
#include "launch.cuh"

#ifndef LOMIX_CLASSES
#error "LOMIX_CLASSES: not defined, expected the number of classes this file is built for"
#endif

namespace lomix::cuda {

template <>
cudaError_t launch_statistics_few<LOMIX_CLASSES>(const Call<float>& call, Memory memory, cudaStream_t stream) {
  return launch(statistics_few<float, LOMIX_CLASSES>, dim3(static_cast<unsigned>(call.tiling.blocks)), kForwardThreads,
                memory, stream, call);
}

template <>
cudaError_t launch_gradients_few<LOMIX_CLASSES>(const Call<float>& call, Memory memory, cudaStream_t stream) {
  const auto with = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(call.tiling.blocks)), kBackwardThreads, memory, stream, call);
  };
  if (call.num_scales <= 4) return with(gradients_few<float, 4, LOMIX_CLASSES>);
  if (call.num_scales == 5) return with(gradients_few<float, 5, LOMIX_CLASSES>);
  return with(gradients_few<float, 6, LOMIX_CLASSES>);
}

}  // namespace lomix::cuda
