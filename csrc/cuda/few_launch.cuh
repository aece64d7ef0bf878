// Launching the kernels for few classes; for the files that are built once for each LOMIX_CLASSES.
#pragma once

#include "few_backward.cuh"
#include "few_forward.cuh"
#include "launch.cuh"

#ifndef LOMIX_CLASSES
#error "LOMIX_CLASSES: not defined, expected the number of classes this file is built for"
#endif

namespace lomix::cuda {

template <int C, bool kGeneral>
cudaError_t launch_statistics_few(const Call<float>& call, Memory memory, cudaStream_t stream) {
  return launch(statistics_few<float, C, kGeneral>, dim3(static_cast<unsigned>(call.tiling.blocks)), kForwardThreads,
                memory, stream, call);
}

template <int C, bool kGeneral>
cudaError_t launch_gradients_few(const Call<float>& call, Memory memory, cudaStream_t stream) {
  const auto with = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(call.tiling.blocks)), kBackwardThreads, memory, stream, call);
  };
  if (call.num_scales <= 4) return with(gradients_few<float, 4, C, kGeneral>);
  if (call.num_scales == 5) return with(gradients_few<float, 5, C, kGeneral>);
  return with(gradients_few<float, 6, C, kGeneral>);
}

}  // namespace lomix::cuda
