// Runs the blocks of a grid one after another, and the threads of a block as fibers. A fiber goes on until it has to
// wait for others; who goes on then is drawn at random, so that a missing barrier soon shows as a wrong answer.
#include "machine.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "rules.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
alignas(128) __attribute__((used, visibility("hidden"))) unsigned char cuda_host_shared[cuda_host::kMostShared + 4096];
}

// The sources declare the array inside functions, so its name is that of the namespace around the function. In
// assembly, because ASan takes an alias in C++ for one more array, and protects what lies behind it twice.
#ifndef CUDA_HOST_NAMESPACE  // mangled
#define CUDA_HOST_NAMESPACE "5lomix4cuda"
#endif
#define CUDA_HOST_SHARED(name) \
  __asm__(".globl " name "\n.hidden " name "\n.type " name ", %object\n.set " name ", cuda_host_shared\n")
CUDA_HOST_SHARED("shared_memory");
CUDA_HOST_SHARED("_ZN12_GLOBAL__N_113shared_memoryE");
CUDA_HOST_SHARED("_ZN" CUDA_HOST_NAMESPACE "13shared_memoryE");
CUDA_HOST_SHARED("_ZN" CUDA_HOST_NAMESPACE "12_GLOBAL__N_113shared_memoryE");

namespace cuda_host {
namespace {

enum class State : unsigned char { kFresh, kRunnable, kWaiting, kEnded };

struct Fiber {
  Context context;
  uint3 index = {};
  unsigned number = 0;
  State state = State::kFresh;
  // What it waits for, what it brings and what it gets.
  Kind kind = Kind::kSync;
  unsigned mask = 0;  // none at a block's barrier
  unsigned size = 0;  // of a shuffle's type
  unsigned source = 0;
  std::uint64_t value = 0;
  std::uint64_t result = 0;
};

// Lanes that have arrived at the same warp operation.
struct Group {
  Kind kind;
  unsigned mask;
  unsigned size;
  unsigned arrived;
};

struct Warp {
  unsigned alive = 0;
  unsigned groups_used = 0;
  std::array<Group, kLanes> groups;  // of different lanes, so there is room
};

class Machine {
 public:
  void run_grid(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* with);
  int wait_for_block(Kind kind, int predicate);
  std::uint64_t wait_for_warp(Kind kind, unsigned mask, unsigned size, std::uint64_t value, unsigned source);
  std::runtime_error failure(const std::string& what) const { return std::runtime_error(what + here()); }
  unsigned lane() const { return current_->number % kLanes; }

  Random random;
  unsigned long long switches = 0;

 private:
  static void entry();
  void run_block();
  void run_thread();
  void thread_ends();
  void go_on(bool ends);
  void go_to(Context& from, Fiber& to, bool ends);
  void make_runnable(Fiber& fiber);
  void complete_block_if_all_arrived();
  void complete_warp(Warp& warp, const Group& group);
  void abandon();
  std::string who_waits() const;
  std::string here() const;

  std::vector<Fiber> fibers_;
  std::vector<Stack> stacks_;
  std::vector<Warp> warps_;
  std::vector<unsigned> runnable_;
  std::vector<unsigned> at_barrier_;
  Context launcher_;
  Fiber* current_ = nullptr;
  unsigned threads_ = 0;
  unsigned ended_ = 0;
  bool abandoning_ = false;
  int nonzero_ = 0;  // predicates, of those at the block's barrier
  int barrier_result_ = 0;
  void (*thread_)(const void*) = nullptr;
  const void* with_ = nullptr;
  std::exception_ptr error_;
};

Machine& machine() {
  static Machine& only = *new Machine;  // never destroyed: threads of the process may outlive static objects
  return only;
}

void Machine::run_grid(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* with) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  threads_ = blockDim.x * blockDim.y * blockDim.z;
  thread_ = thread;
  with_ = with;
  fibers_.resize(threads_);
  warps_.resize((threads_ + kLanes - 1) / kLanes);
  while (stacks_.size() < threads_) stacks_.emplace_back(stacks_.size());
  for (unsigned i = 0; i < threads_; ++i) {
    fibers_[i].number = i;
    fibers_[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }

  std::vector<std::uint64_t> order(std::uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  ASAN_POISON_MEMORY_REGION(cuda_host_shared, sizeof cuda_host_shared);
  ASAN_UNPOISON_MEMORY_REGION(cuda_host_shared, config.dynamicSmemBytes);
  for (const std::uint64_t block : order) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    std::fill_n(cuda_host_shared, config.dynamicSmemBytes, 0xFF);  // NaN, so nothing unwritten passes for a zero
    run_block();
    if (error_ != nullptr) break;
  }
  ASAN_POISON_MEMORY_REGION(cuda_host_shared, sizeof cuda_host_shared);
  if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Machine::run_block() {
  ended_ = 0;
  nonzero_ = 0;
  at_barrier_.clear();
  runnable_.clear();
  for (Warp& warp : warps_) warp.alive = warp.groups_used = 0;
  for (Fiber& fiber : fibers_) {
    stacks_[fiber.number].prepare(fiber.context, &Machine::entry);
    make_runnable(fiber);
    fiber.state = State::kFresh;
    warps_[fiber.number / kLanes].alive |= 1U << fiber.number % kLanes;
  }
  const unsigned first = static_cast<unsigned>(random.below(threads_));
  std::swap(runnable_[first], runnable_.back());
  runnable_.pop_back();
  go_to(launcher_, fibers_[first], false);

  // Back here: all have ended, or one has failed, or nobody can run.
  current_ = nullptr;
  if (error_ == nullptr && ended_ < threads_) {
    error_ = std::make_exception_ptr(failure("deadlock: " + who_waits() + ","));
  }
  if (error_ != nullptr) abandon();
}

// A fiber's first function. Its frame is never returned from, so ASan should not mark it.
__attribute__((no_sanitize_address)) void Machine::entry() {
  arrived(nullptr);
  machine().run_thread();
  machine().thread_ends();
  machine().go_on(true);
  std::abort();
}

void Machine::run_thread() {
  try {
    thread_(with_);
  } catch (...) {  // must not reach the bottom of this stack; the launch throws it again
    error_ = std::current_exception();
  }
}

void Machine::thread_ends() {
  Fiber& self = *current_;
  self.state = State::kEnded;
  ++ended_;
  Warp& warp = warps_[self.number / kLanes];
  const unsigned bit = 1U << self.number % kLanes;
  warp.alive &= ~bit;
  for (unsigned i = 0; i < warp.groups_used && error_ == nullptr; ++i) {
    if ((warp.groups[i].mask & bit) == 0) continue;
    error_ = std::make_exception_ptr(failure("a thread has ended for which others wait: " + who_waits() + ","));
  }
  complete_block_if_all_arrived();
}

// Waits, or ends, while others run.
void Machine::go_on(bool ends) {
  Fiber& self = *current_;
  ++switches;
  if (runnable_.empty() || error_ != nullptr) {
    switch_stack(self.context, launcher_, ends);
  } else {
    unsigned& drawn = runnable_[random.below(runnable_.size())];
    Fiber& next = fibers_[drawn];
    drawn = runnable_.back();
    runnable_.pop_back();
    if (&next == &self) return;
    go_to(self.context, next, ends);
  }
  if (abandoning_) switch_stack(self.context, launcher_, true);
}

void Machine::go_to(Context& from, Fiber& to, bool ends) {
  current_ = &to;
  to.state = State::kRunnable;
  threadIdx = to.index;
  switch_stack(from, to.context, ends);
}

void Machine::make_runnable(Fiber& fiber) {
  fiber.state = State::kRunnable;
  runnable_.push_back(fiber.number);
}

// After a failure nobody goes on; what ASan keeps for fibers that will never end is given back.
void Machine::abandon() {
  for (Fiber& fiber : fibers_) {
    if (fiber.state == State::kFresh || fiber.state == State::kEnded) continue;
#ifdef __SANITIZE_ADDRESS__
    abandoning_ = true;
    switch_stack(launcher_, fiber.context, false);
    abandoning_ = false;
#endif
    stacks_[fiber.number].unpoison();
  }
}

int Machine::wait_for_block(Kind kind, int predicate) {
  Fiber& self = *current_;
  self.kind = kind;
  self.mask = self.size = 0;
  self.state = State::kWaiting;
  nonzero_ += predicate != 0;
  at_barrier_.push_back(self.number);
  complete_block_if_all_arrived();
  go_on(false);
  return barrier_result_;  // the next barrier cannot complete without this thread, so this is still the right one
}

void Machine::complete_block_if_all_arrived() {
  if (at_barrier_.empty() || at_barrier_.size() + ended_ < threads_) return;
  const Kind kind = fibers_[at_barrier_.front()].kind;
  for (const unsigned i : at_barrier_) {
    if (fibers_[i].kind != kind) return;  // nobody can run, which becomes a deadlock
  }
  const int count = static_cast<int>(at_barrier_.size());
  barrier_result_ = kind == Kind::kSyncCount ? nonzero_ : kind == Kind::kSyncAnd ? nonzero_ == count : nonzero_ != 0;
  for (const unsigned i : at_barrier_) make_runnable(fibers_[i]);
  at_barrier_.clear();
  nonzero_ = 0;
}

std::uint64_t Machine::wait_for_warp(Kind kind, unsigned mask, unsigned size, std::uint64_t value, unsigned source) {
  Fiber& self = *current_;
  Warp& warp = warps_[self.number / kLanes];
  const unsigned bit = 1U << self.number % kLanes;
  self.kind = kind;
  self.mask = mask;
  self.size = size;
  self.value = value;
  self.source = source;
  if ((mask & bit) == 0) throw failure("the mask does not name the lane itself");
  if ((mask & ~warp.alive) != 0) throw failure("the mask names lanes that have ended or never were");
  if ((mask & 1U << source) == 0) throw failure("lane " + std::to_string(source) + " is read, but not in the mask");

  unsigned place = 0;
  while (place < warp.groups_used &&
         (warp.groups[place].kind != kind || warp.groups[place].mask != mask || warp.groups[place].size != size)) {
    ++place;
  }
  if (place == warp.groups_used) warp.groups[warp.groups_used++] = {kind, mask, size, 0};
  Group& group = warp.groups[place];
  group.arrived |= bit;
  self.state = State::kWaiting;
  if (group.arrived == mask) {
    complete_warp(warp, group);
    group = warp.groups[--warp.groups_used];
  }
  go_on(false);
  return self.result;
}

// The results are worked out now, because a lane that goes on first may soon bring its next value.
void Machine::complete_warp(Warp& warp, const Group& group) {
  Fiber* const lanes = &fibers_[static_cast<std::size_t>(&warp - warps_.data()) * kLanes];
  const bool votes = group.kind == Kind::kBallot || group.kind == Kind::kAny || group.kind == Kind::kAll;
  unsigned ballot = 0;
  for (unsigned left = votes ? group.mask : 0; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if (lanes[lane].value != 0) ballot |= 1U << lane;
  }
  for (unsigned left = group.mask; left != 0; left &= left - 1) {
    Fiber& fiber = lanes[std::countr_zero(left)];
    switch (group.kind) {
      case Kind::kBallot: fiber.result = ballot; break;
      case Kind::kAny: fiber.result = ballot != 0; break;
      case Kind::kAll: fiber.result = ballot == group.mask; break;
      default: fiber.result = lanes[fiber.source].value;
    }
    make_runnable(fiber);
  }
}

std::string Machine::here() const {
  const auto text = [](const uint3& at) {
    std::array<char, 48> text;
    std::snprintf(text.data(), text.size(), "(%u, %u, %u)", at.x, at.y, at.z);
    return std::string(text.data());
  };
  const std::string place = " in block " + text(blockIdx);
  if (current_ == nullptr) return place;
  const std::string thread = place + ", thread " + text(current_->index);
  return current_->state == State::kEnded ? thread
                                          : thread + ", " + said_of(current_->kind, current_->mask, current_->size);
}

// Such as "threads 0-30 wait at __syncthreads; thread 31 has ended".
std::string Machine::who_waits() const {
  const auto what = [](const Fiber& fiber, bool many) -> std::string {
    if (fiber.state == State::kEnded) return many ? " have ended" : " has ended";
    if (fiber.state != State::kWaiting) return " could run";
    return (many ? " wait at " : " waits at ") + said_of(fiber.kind, fiber.mask, fiber.size);
  };
  std::string text;
  for (unsigned first = 0, last = 0; first < threads_; first = last + 1) {
    last = first;
    while (last + 1 < threads_ && what(fibers_[last + 1], true) == what(fibers_[first], true)) ++last;
    if (first != 0) text += "; ";
    const bool many = first != last;
    text += many ? "threads " + std::to_string(first) + "-" + std::to_string(last) : "thread " + std::to_string(first);
    text += what(fibers_[first], many);
  }
  return text;
}

}  // namespace

int wait_for_block(Kind kind, int predicate) { return machine().wait_for_block(kind, predicate); }

void wait_for_warp(unsigned mask) {
  const unsigned own = machine().lane();
  machine().wait_for_warp(Kind::kWarp, mask, 0, 0, own);
}

unsigned vote(Kind kind, unsigned mask, int predicate) {
  const unsigned own = machine().lane();
  return static_cast<unsigned>(machine().wait_for_warp(kind, mask, 0, predicate != 0, own));
}

std::uint64_t shuffle(Kind kind, unsigned mask, std::uint64_t value, int operand, int width, unsigned size) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
    throw machine().failure(std::string(name_of(kind)) + " has a width of " + std::to_string(width));
  }
  const unsigned source = source_of(kind, machine().lane(), operand, static_cast<unsigned>(width));
  return machine().wait_for_warp(kind, mask, size, value, source);
}

void run_grid(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* with) {
  if (!machine().random.seeded) {
    const char* seed = std::getenv("CUDA_HOST_SEED");
    machine().random.seed(seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10));
  }
  machine().run_grid(config, thread, with);
}

}  // namespace cuda_host

void cuda_host_seed(unsigned long long seed) { cuda_host::machine().random.seed(seed); }
unsigned long long cuda_host_switches() { return cuda_host::machine().switches; }
