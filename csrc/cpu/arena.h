// Scratch memory of one thread, handed out piece by piece.
#pragma once

#include <cstdint>

#include "simd.h"

namespace lomix::cpu {
inline namespace CPU_CAPABILITY {

// 64-byte aligned pieces of one block; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  // The same, filled with zeros.
  template <typename T>
  T* take_zeros(int64_t count) {
    T* at = take<T>(count);
    if (at != nullptr) std::memset(at, 0, sizeof(T) * count);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace lomix::cpu
