// Launching a kernel with any amount of shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lomix::cuda {

template <typename... Arguments, typename... Given>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
                   Given&&... given) {
  // More than 48 KiB has to be asked for, by every device that runs the kernel; it costs the host a microsecond.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace lomix::cuda
