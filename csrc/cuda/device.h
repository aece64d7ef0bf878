// The GPU a call runs on: what it has, being on it, and what CUDA says. The only place that talks to torch's CUDA
// runtime, so that everything around the kernels can be tested without one.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime.h>

namespace lomix::cuda {

struct DeviceFacts {
  int multiprocessors;
  int shared_per_block;           // bytes of shared memory a block may have at most, once it has asked for them
  int shared_per_multiprocessor;  // bytes of shared memory that its blocks have together
};

// Asked once for each device.
DeviceFacts facts(c10::Device device);

// Makes `device` the current one, and the one before it again at the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const;  // torch's current stream of the device

 private:
  c10::DeviceIndex device_;
  c10::DeviceIndex previous_;
};

// Raises RuntimeError (in Python) unless `error` is cudaSuccess. `what` was being done, as in "launching many_forward".
void check(cudaError_t error, const char* what);

}  // namespace lomix::cuda
