// What tests say to the machine, and its two files to each other.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

extern "C" {
#pragma GCC visibility push(default)
// The order of blocks and threads follows from this; without a call, from the environment's CUDA_HOST_SEED, or 1.
void cuda_host_seed(unsigned long long seed);
// How often a thread has waited or ended so far.
unsigned long long cuda_host_switches();
#pragma GCC visibility pop
}

namespace cuda_host {

constexpr std::size_t kMostShared = 227 * 1024;  // bytes of a block, with the kernel's attribute
constexpr std::size_t kMostSharedByDefault = 48 * 1024;
constexpr unsigned kMostThreads = 1024;

// The launch's configuration has been checked.
__attribute__((visibility("hidden"))) void run_grid(const cudaLaunchConfig_t& config, void (*thread)(const void*),
                                                    const void* with);

}  // namespace cuda_host
