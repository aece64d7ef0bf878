// Switching between stacks. Everything here runs in one OS thread.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#define CUDA_HOST_ASSEMBLY 1
#else
#define CUDA_HOST_ASSEMBLY 0
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(place, bytes) ((void)(place), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(place, bytes) ((void)(place), (void)(bytes))
#endif

#if CUDA_HOST_ASSEMBLY
// swapcontext makes two system calls each time. This keeps what the calling convention says a function keeps; nobody
// changes the floating-point control words, so they stay as they are.
extern "C" __attribute__((visibility("hidden"))) void cuda_host_switch(void** save, void* load);
__asm__(
    ".pushsection .text\n"
    ".globl cuda_host_switch\n"
    ".hidden cuda_host_switch\n"
    ".type cuda_host_switch, @function\n"
    "cuda_host_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size cuda_host_switch, .-cuda_host_switch\n"
    ".popsection\n");
#endif

#pragma GCC visibility push(hidden)

namespace cuda_host {

// A place at which to go on. The one of the launching thread has its own stack, whose bounds ASan tells us.
struct Context {
#if CUDA_HOST_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t user = {};
#endif
  const void* bottom = nullptr;
  std::size_t size = 0;
  void* fake_stack = nullptr;
};

inline Context* switched_from = nullptr;

// Has to come first wherever a switch arrives.
inline void arrived([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &switched_from->bottom, &switched_from->size);
#endif
}

// `from` never goes on if it `ends`, and ASan may give up the fake stack of its frames.
inline void switch_stack(Context& from, Context& to, [[maybe_unused]] bool ends) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
  switched_from = &from;
#if CUDA_HOST_ASSEMBLY
  cuda_host_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.user, &to.user);
#endif
  arrived(from.fake_stack);
}

// Made once for each thread of the largest block so far, and used again by every block.
class Stack {
 public:
  explicit Stack(std::size_t number) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped, page, PROT_NONE);  // running out of stack is a fault, not a neighbour's wrong answer
    bottom_ = static_cast<char*>(mapped) + page;
    // Tops at the same offset in every page would all compete for the same few lines of the cache.
    top_ = static_cast<char*>(mapped) + kBytes - number * 5 % 64 * 64;
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  Stack(Stack&& other) noexcept : bottom_(other.bottom_), top_(other.top_) { other.bottom_ = nullptr; }
  ~Stack() {
    if (bottom_ == nullptr) return;
    unpoison();
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    munmap(bottom_ - page, kBytes);
  }

  // Frames that were left, not returned from, leave ASan's marks behind.
  void unpoison() { ASAN_UNPOISON_MEMORY_REGION(bottom_, static_cast<std::size_t>(top_ - bottom_)); }

  // So that switching to `context` calls `entry`, which must not return.
  void prepare(Context& context, void (*entry)()) {
    context.bottom = bottom_;
    context.size = static_cast<std::size_t>(top_ - bottom_);
    context.fake_stack = nullptr;
    // A fiber that ended properly has returned from its frames, but for the last few: UBSan gives even those of the
    // switch something for ASan to mark.
    ASAN_UNPOISON_MEMORY_REGION(top_ - kLastFrames, kLastFrames);
#if CUDA_HOST_ASSEMBLY
    // Six registers, where to return to, and no caller: the stack is as aligned as a call leaves it.
    void** words = reinterpret_cast<void**>(top_) - 8;
    for (int i = 0; i < 8; ++i) words[i] = nullptr;
    words[6] = reinterpret_cast<void*>(entry);
    context.stack_pointer = words;
#else
    getcontext(&context.user);
    context.user.uc_stack.ss_sp = bottom_;
    context.user.uc_stack.ss_size = context.size;
    context.user.uc_link = nullptr;
    makecontext(&context.user, entry, 0);
#endif
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t kBytes = 512 * 1024;  // the frames are larger
#else
  static constexpr std::size_t kBytes = 256 * 1024;
#endif
  static constexpr std::size_t kLastFrames = 8192;
  char* bottom_;
  char* top_;
};

}  // namespace cuda_host

#pragma GCC visibility pop
