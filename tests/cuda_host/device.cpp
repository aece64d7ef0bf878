// Stands in for csrc/cuda/device.cpp where kernels are executed on the host: a device of any size, and no streams.
#include "cuda/device.h"

#include <c10/util/Exception.h>

namespace lomix::cuda {
namespace {

DeviceFacts the_device{2, 99 * 1024, 100 * 1024};

}  // namespace

DeviceFacts facts(c10::Device) { return the_device; }

OnDevice::OnDevice(c10::Device device) : device_(device.index()), previous_(device.index()) {}
OnDevice::~OnDevice() = default;
cudaStream_t OnDevice::stream() const { return nullptr; }

void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace lomix::cuda

// Size of the device that calls are laid out for from now on.
extern "C" void cuda_host_device(int multiprocessors, int shared_per_block, int shared_per_multiprocessor) {
  lomix::cuda::the_device = {multiprocessors, shared_per_block, shared_per_multiprocessor};
}
