// What a thread knows about its place, and everything at which threads wait for each other.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>

#include "types.h"

// Hidden, because the real runtime may be in the process too, with the same names.
#pragma GCC visibility push(hidden)

// Set by the machine whenever another thread goes on; no kernel may write them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_host {

// In the order of names in machine.cpp.
enum class Kind { kSync, kSyncOr, kSyncAnd, kSyncCount, kWarp, kShuffle, kUp, kDown, kXor, kBallot, kAny, kAll };

// All of these return when the others have arrived; they throw where CUDA leaves the behaviour undefined.
int wait_for_block(Kind kind, int predicate);
void wait_for_warp(unsigned mask);
unsigned vote(Kind kind, unsigned mask, int predicate);
// `size` is that of the value's type: lanes that disagree about it are not in the same shuffle.
std::uint64_t shuffle(Kind kind, unsigned mask, std::uint64_t value, int operand, int width, unsigned size);

template <class T>
concept Shuffled = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, long> ||
                   std::same_as<T, unsigned long> || std::same_as<T, long long> ||
                   std::same_as<T, unsigned long long> || std::same_as<T, float> || std::same_as<T, double>;

template <Shuffled T>
inline T shuffle_bits(Kind kind, unsigned mask, T value, int operand, int width) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, operand, width, sizeof value);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait_for_block(cuda_host::Kind::kSync, 0); }
inline int __syncthreads_or(int p) { return cuda_host::wait_for_block(cuda_host::Kind::kSyncOr, p); }
inline int __syncthreads_and(int p) { return cuda_host::wait_for_block(cuda_host::Kind::kSyncAnd, p); }
inline int __syncthreads_count(int p) { return cuda_host::wait_for_block(cuda_host::Kind::kSyncCount, p); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFU) { cuda_host::wait_for_warp(mask); }

template <cuda_host::Shuffled T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return cuda_host::shuffle_bits(cuda_host::Kind::kShuffle, mask, value, lane, width);
}
template <cuda_host::Shuffled T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_host::shuffle_bits(cuda_host::Kind::kUp, mask, value, static_cast<int>(delta), width);
}
template <cuda_host::Shuffled T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_host::shuffle_bits(cuda_host::Kind::kDown, mask, value, static_cast<int>(delta), width);
}
template <cuda_host::Shuffled T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return cuda_host::shuffle_bits(cuda_host::Kind::kXor, mask, value, lane_mask, width);
}

inline unsigned __ballot_sync(unsigned mask, int p) { return cuda_host::vote(cuda_host::Kind::kBallot, mask, p); }
inline int __any_sync(unsigned mask, int p) {
  return static_cast<int>(cuda_host::vote(cuda_host::Kind::kAny, mask, p));
}
inline int __all_sync(unsigned mask, int p) {
  return static_cast<int>(cuda_host::vote(cuda_host::Kind::kAll, mask, p));
}

#pragma GCC visibility pop
