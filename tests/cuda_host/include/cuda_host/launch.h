// The host's side: errors, attributes and launches. There is one stream, and every launch has ended when it returns.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "types.h"

enum cudaError {  // with CUDA's numbers
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
typedef enum cudaError cudaError_t;
typedef struct CUstream_st* cudaStream_t;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchAttribute;  // launches with attributes are refused: the machine has no meaning for them

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Hidden, because the real runtime may be in the process too, with the same names.
#pragma GCC visibility push(hidden)

namespace cuda_host {
cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, void (*thread)(const void*), const void* with);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
}  // namespace cuda_host

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaMemsetAsync(void* place, int value, std::size_t bytes, cudaStream_t stream = nullptr);

template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_host::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Throws std::runtime_error where a kernel deadlocks or does what CUDA leaves undefined.
template <class... Parameters, class... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                                      Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "a kernel has 32764 bytes of parameters at most");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters travel to the device as bytes");
  using Values = std::tuple<Parameters...>;
  const std::pair<void (*)(Parameters...), Values> call(kernel, Values(std::forward<Arguments>(arguments)...));
  const auto thread = [](const void* with) {
    const auto& [function, values] = *static_cast<const std::pair<void (*)(Parameters...), Values>*>(with);
    std::apply(function, values);
  };
  return cuda_host::launch(config, reinterpret_cast<const void*>(kernel), thread, &call);
}

#pragma GCC visibility pop
