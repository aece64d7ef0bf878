// What does not depend on who waits: names, which lane a shuffle reads, and random numbers.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>

namespace cuda_host {

inline constexpr unsigned kLanes = 32;
inline constexpr std::array<const char*, 12> kNames = {
    "__syncthreads",  "__syncthreads_or", "__syncthreads_and", "__syncthreads_count", "__syncwarp", "__shfl_sync",
    "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",   "__ballot_sync",       "__any_sync", "__all_sync"};

inline const char* name_of(Kind kind) { return kNames[static_cast<std::size_t>(kind)]; }

inline std::string said_of(Kind kind, unsigned mask, unsigned size) {
  if (mask == 0) return name_of(kind);
  std::array<char, 64> text;
  std::snprintf(text.data(), text.size(), "%s with mask 0x%08x", name_of(kind), mask);
  return text.data() + (size == 0 ? std::string() : " of " + std::to_string(size) + " bytes");
}

// The lane to read from, which is the reader's own where CUDA says so.
inline unsigned source_of(Kind kind, unsigned lane, int operand, unsigned width) {
  const unsigned first = lane & ~(width - 1), last = first + width - 1, by = static_cast<unsigned>(operand) & 31U;
  switch (kind) {
    case Kind::kUp: return lane < first + by ? lane : lane - by;
    case Kind::kDown: return lane + by > last ? lane : lane + by;
    case Kind::kXor: return (lane ^ by) > last ? lane : lane ^ by;  // earlier parts of the warp may be read
    default: return first | (by & (width - 1));
  }
}

// The same numbers from the same seed.
struct Random {
  std::uint64_t state = 1;
  bool seeded = false;

  void seed(std::uint64_t value) {
    state = value * 0x9E3779B97F4A7C15U ^ 0xD1B54A32D192ED03U;  // neighbouring seeds should have little in common
    if (state == 0) state = 1;
    for (int i = 0; i < 8; ++i) below(2);
    seeded = true;
  }
  std::uint64_t below(std::uint64_t bound) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return ((state >> 32) * bound) >> 32;
  }
};

}  // namespace cuda_host
