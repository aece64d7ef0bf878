// Launching a kernel with any amount of shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "call.h"

namespace lomix::cuda {

template <typename... Arguments, typename... Given>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, int threads, Memory memory, cudaStream_t stream,
                   Given&&... given) {
  // More than 48 KiB has to be asked for, on every device that runs the kernel. What is asked for belongs to the
  // kernel, not to the launch: always the most, so that a launch from another thread cannot take from this one.
  if (memory.shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory.most);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(memory.shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace lomix::cuda
