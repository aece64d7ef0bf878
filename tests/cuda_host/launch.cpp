// The host's side: refuses what hardware refuses, and remembers errors and attributes.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "machine.h"

namespace cuda_host {
namespace {

// One grid at a time, whoever launches; the rest is guarded as well.
std::mutex mutex;
cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

std::map<const void*, std::size_t>& most_shared() {
  static auto& only = *new std::map<const void*, std::size_t>;
  return only;
}

cudaError_t check(const cudaLaunchConfig_t* config, const void* kernel) {
  if (config == nullptr || kernel == nullptr || config->numAttrs != 0) return cudaErrorInvalidValue;
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0 ||
      grid.x > 0x7FFFFFFFU || grid.y > 65535 || grid.z > 65535 || block.x > kMostThreads || block.y > kMostThreads ||
      block.z > 64 || std::size_t{block.x} * block.y * block.z > kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  const auto found = most_shared().find(kernel);
  const std::size_t most = found == most_shared().end() ? kMostSharedByDefault : found->second;
  return config->dynamicSmemBytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, void (*thread)(const void*),
                   const void* with) {
  const std::lock_guard<std::mutex> guard(mutex);
  const cudaError_t error = remember(check(config, kernel));
  if (error == cudaSuccess) run_grid(*config, thread, with);
  return error;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> guard(mutex);
  if (kernel == nullptr || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<std::size_t>(value) > kMostShared) {
    return remember(cudaErrorInvalidValue);
  }
  // An attribute below the default does not take anything away.
  most_shared()[kernel] = std::max(static_cast<std::size_t>(value), kMostSharedByDefault);
  return cudaSuccess;
}

}  // namespace cuda_host

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::mutex> guard(cuda_host::mutex);
  return cuda_host::last_error;
}

cudaError_t cudaGetLastError() {
  const std::lock_guard<std::mutex> guard(cuda_host::mutex);
  const cudaError_t error = cuda_host::last_error;
  cuda_host::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unrecognized error code";
}

cudaError_t cudaMemsetAsync(void* place, int value, std::size_t bytes, cudaStream_t) {
  std::memset(place, value, bytes);
  return cudaSuccess;
}
