#include "device.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <map>
#include <mutex>
#include <string>

namespace lomix::cuda {
namespace {

int attribute(cudaDeviceAttr which, c10::DeviceIndex device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for a property of the GPU");
  return value;
}

// What to do when the module holds no code that the current GPU can run.
std::string other_gpu() {
  int device = 0, major = 0, minor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  const std::string its = known ? std::to_string(major) + "." + std::to_string(minor) : "<compute capability>";
  return "; lomix_fast was built for other GPUs (" LOMIX_CUDA_ARCHITECTURES
         "), to build it for this one, run TORCH_CUDA_ARCH_LIST=" +
         its + " LOMIX_FAST_BUILD=cuda pip install --no-build-isolation --no-deps --force-reinstall . in its sources";
}

}  // namespace

DeviceFacts facts(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, DeviceFacts> known;
  const c10::DeviceIndex index = device.has_index() ? device.index() : c10::cuda::current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  return known[index] = {attribute(cudaDevAttrMultiProcessorCount, index),
                         attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                         attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index)};
}

OnDevice::OnDevice(c10::Device device)
    : device_(device.has_index() ? device.index() : c10::cuda::current_device()),
      previous_(c10::cuda::ExchangeDevice(device_)) {}

OnDevice::~OnDevice() { c10::cuda::MaybeExchangeDevice(previous_); }

cudaStream_t OnDevice::stream() const { return c10::cuda::getCurrentCUDAStream(device_).stream(); }

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // said here, it must not be found again by the next one who asks
  TORCH_CHECK(false, "CUDA error while ", what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")",
              error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ? other_gpu() : "");
}

}  // namespace lomix::cuda
