// What one card does at its best: a program of its own that prints one JSON object.
//
// Each rate is the best of several runs of one or two milliseconds. Every thread has independent chains of operations,
// so that latency is hidden, and stores what comes of them, so that nothing can be left out; the loops that the
// compilers made are counted by tests/test_gpu_day_limits.py. Exit status 1 and a line on stderr where a call fails.

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

constexpr int kThreads = 256;      // of a block
constexpr int kRuns = 6;           // the best of them counts
constexpr double kSeconds = 1e-3;  // of one run, about

[[noreturn]] void fail(const char* what, const char* why) {
  std::fprintf(stderr, "rates: %s failed: %s\n", what, why);
  std::exit(1);
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(what, cudaGetErrorString(status));
}

#define CHECK(call) check(call, #call)

// How long block 0 ran, by the core's clock and by that of the wall.
struct Span {
  unsigned long long clocks, nanoseconds;
};

__device__ __forceinline__ unsigned long long core_clock() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now));
  return now;
}

__device__ __forceinline__ unsigned long long wall_clock() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Keeps the time from its construction to `end`.
struct Stopwatch {
  unsigned long long clocks, nanoseconds;

  __device__ Stopwatch() : clocks(core_clock()), nanoseconds(wall_clock()) {}

  __device__ void end(Span* span) const {
    if (blockIdx.x == 0 && threadIdx.x == 0) *span = {core_clock() - clocks, wall_clock() - nanoseconds};
  }
};

__device__ __forceinline__ int thread_number() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// What a kernel executes for each round of its loop and thread; the loops below and main() both use them.
constexpr int kChains = 16;                 // independent values of a thread
constexpr int kFfma = 256;                  // multiply-adds
constexpr int kEx2 = 64;                    // exponentials
constexpr int kIssued = 256;                // as many multiply-adds as logical operations, together
constexpr int kLoads = 32;                  // of shared memory
constexpr int kL2Loads = 16;                // of 16 bytes
constexpr int kMmas = 32;                   // matrix instructions, of a warp
[[maybe_unused]] constexpr int kTiles = 8;  // independent accumulators of a warp

template <bool Uniform, int Words>
__device__ __forceinline__ void load_shared(int rounds, Span* span, float* out) {
  __shared__ __align__(16) float memory[kThreads * Words];
  for (int w = 0; w < Words; ++w) memory[threadIdx.x * Words + w] = 1e-3f * static_cast<float>(threadIdx.x + w);
  __syncthreads();
  const int of = Uniform ? threadIdx.x / 32 * 32 : threadIdx.x;
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(memory + of * Words));
  float sum = 0, other = 0;
  const Stopwatch watch;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      // All words are used, or the compiler loads fewer of them; multiply-adds take two words an issue slot.
      if constexpr (Words == 4) {
        float a, b, c, d;
        asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
                     : "r"(from));
        sum = fmaf(a, b, sum);
        other = fmaf(c, d, other);
      } else {
        float a;
        asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(a) : "r"(from));
        sum += a;
      }
    }
  }
  watch.end(span);
  out[thread_number()] = sum + other;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) nothing() {}

extern "C" __global__ void __launch_bounds__(kThreads)
    multiply_adds(int rounds, float factor, float shift, Span* span, float* out) {
  float x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = static_cast<float>(threadIdx.x + c);
  const Stopwatch watch;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < kFfma; ++k) x[k % kChains] = fmaf(x[k % kChains], factor, shift);
  }
  watch.end(span);
  float sum = 0;
  for (int c = 0; c < kChains; ++c) sum += x[c];
  out[thread_number()] = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads) exponentials(int rounds, Span* span, float* out) {
  float x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = -1e-3f * static_cast<float>(threadIdx.x + c);
  const Stopwatch watch;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < kEx2; ++k) asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[k % kChains]));
  }
  watch.end(span);
  float sum = 0;
  for (int c = 0; c < kChains; ++c) sum += x[c];
  out[thread_number()] = sum;
}

// Half multiply-adds and half logical operations, which other units do: together they take every issue slot.
extern "C" __global__ void __launch_bounds__(kThreads)
    issued(int rounds, float factor, float shift, Span* span, float* out) {
  constexpr int kHalf = kChains / 2;
  float x[kHalf];
  unsigned bits[kHalf];
  for (int c = 0; c < kHalf; ++c) {
    x[c] = static_cast<float>(threadIdx.x + c);
    bits[c] = threadIdx.x * 2654435761u + 40503u * c;
  }
  const Stopwatch watch;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < kIssued / 2; ++k) {
      x[k % kHalf] = fmaf(x[k % kHalf], factor, shift);
      // The majority of three values, of which two are others than the last time: no two can be made one.
      asm("lop3.b32 %0, %0, %1, %2, 0xe8;"
          : "+r"(bits[k % kHalf])
          : "r"(bits[(k + 3) % kHalf]), "r"(bits[(k + 5) % kHalf]));
    }
  }
  watch.end(span);
  float sum = 0;
  for (int c = 0; c < kHalf; ++c) sum += x[c] + static_cast<float>(bits[c]);
  out[thread_number()] = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads) shared_word_lane(int rounds, Span* span, float* out) {
  load_shared<false, 1>(rounds, span, out);
}

extern "C" __global__ void __launch_bounds__(kThreads) shared_word_uniform(int rounds, Span* span, float* out) {
  load_shared<true, 1>(rounds, span, out);
}

extern "C" __global__ void __launch_bounds__(kThreads) shared_four_lane(int rounds, Span* span, float* out) {
  load_shared<false, 4>(rounds, span, out);
}

extern "C" __global__ void __launch_bounds__(kThreads) shared_four_uniform(int rounds, Span* span, float* out) {
  load_shared<true, 4>(rounds, span, out);
}

// Every thread reads `apart`-spaced places again and again, past L1; slots is a power of two.
extern "C" __global__ void __launch_bounds__(kThreads)
    second_cache(int rounds, const float4* from, int apart, int slots, Span* span, float* out) {
  const float4* const mine = from + thread_number();
  float sum = 0, other = 0;
  const Stopwatch watch;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < kL2Loads; ++k) {
      float a, b, c, d;
      asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
                   : "l"(mine + static_cast<long long>((i * kL2Loads + k) & (slots - 1)) * apart));
      sum = fmaf(a, b, sum);
      other = fmaf(c, d, other);
    }
  }
  watch.end(span);
  out[thread_number()] = sum + other;
}

extern "C" __global__ void __launch_bounds__(kThreads) copy(const float4* from, float4* to, long long count) {
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = from[i];
  }
}

// Products of matrices that are not zero: what a core draws, and so its clock, depends on the bits that change.
// `multiply` takes four sums of a lane and its parts of both factors.
template <typename Multiply>
__device__ void matrix(int rounds, Span* span, float* out, unsigned a, unsigned b, Multiply multiply) {
  float d[kTiles][4] = {};
  for (int t = 0; t < kTiles; ++t) d[t][0] = static_cast<float>(t);  // no two products are the same
  const Stopwatch watch;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < kMmas; ++k) multiply(d[k % kTiles], a, b);
  }
  watch.end(span);
  float sum = 0;
  for (int t = 0; t < kTiles; ++t) sum += d[t][0] + d[t][1] + d[t][2] + d[t][3];
  out[thread_number()] = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads) matrix_half(int rounds, Span* span, float* out) {
#if __CUDA_ARCH__ >= 800
  const unsigned a = 0x2c003000u ^ (threadIdx.x * 0x00130017u & 0x03ff03ffu);  // two halves of about 0.1
  const unsigned b = 0x34002800u ^ (threadIdx.x * 0x002b0011u & 0x03ff03ffu);
  matrix(rounds, span, out, a, b, [](float* to, unsigned a, unsigned b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %4, %5}, {%5, %4}, "
        "{%0, %1, %2, %3};"
        : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
        : "r"(a), "r"(b));
  });
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads) matrix_tf32(int rounds, Span* span, float* out) {
#if __CUDA_ARCH__ >= 800
  const unsigned a = __float_as_uint(0.01f * static_cast<float>(threadIdx.x % 29 + 1));
  const unsigned b = __float_as_uint(0.01f * static_cast<float>(threadIdx.x % 31 + 1));
  matrix(rounds, span, out, a, b, [](float* to, unsigned a, unsigned b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %4, %5}, {%5, %4}, "
        "{%0, %1, %2, %3};"
        : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
        : "r"(a), "r"(b));
  });
#endif
}

namespace {

struct Card {
  cudaDeviceProp properties;
  Span* span;  // on the device
  float* out;  // one float for every thread of a full card
  cudaEvent_t begin, end;

  int cores() const { return properties.multiProcessorCount; }
};

struct Best {
  double seconds = 1e30, clock = 0;  // of the fastest run; Hz, 0 where nobody looked
};

// Seconds of one launch by the device's events.
template <typename Launch>
double seconds_of(const Card& card, const Launch& launch) {
  CHECK(cudaEventRecord(card.begin));
  launch();
  CHECK(cudaGetLastError());
  CHECK(cudaEventRecord(card.end));
  CHECK(cudaEventSynchronize(card.end));
  float milliseconds = 0;
  CHECK(cudaEventElapsedTime(&milliseconds, card.begin, card.end));
  return 1e-3 * static_cast<double>(milliseconds);
}

template <typename Launch>
Best best_of(const Card& card, const Launch& launch) {
  Best best;
  for (int i = 0; i < kRuns; ++i) {
    const double seconds = seconds_of(card, launch);
    if (seconds >= best.seconds) continue;
    Span span{};
    CHECK(cudaMemcpy(&span, card.span, sizeof(span), cudaMemcpyDeviceToHost));
    const double clock = span.nanoseconds > 0 ? 1e9 * static_cast<double>(span.clocks) / span.nanoseconds : 0;
    best = {seconds, clock};
  }
  return best;
}

// Blocks of one kernel that fill the card exactly once.
template <typename Kernel>
int full_grid(const Card& card, Kernel kernel) {
  int blocks = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  if (blocks < 1) fail("cudaOccupancyMaxActiveBlocksPerMultiprocessor", "no block of a kernel fits");
  return blocks * card.cores();
}

bool first = true;

// One measure. value in `unit`; of_core: operations a core and clock, or 0 where that says nothing.
void print(const char* name, double value, const char* unit, double of_core = 0, double clock = 0) {
  std::printf("%s\n  {\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"", first ? "" : ",", name, value, unit);
  if (of_core > 0) std::printf(", \"per_sm_clock\": %.6g", of_core);
  if (clock > 0) std::printf(", \"clock_ghz\": %.4f", clock * 1e-9);
  std::printf("}");
  first = false;
}

// Measures operations of a loop and prints them.
// launch: (blocks, rounds); work: operations of one thread and round; returns the clock in Hz.
template <typename Kernel, typename Launch>
double rate(const Card& card, const char* name, const char* unit, Kernel kernel, double work, const Launch& launch) {
  const int blocks = full_grid(card, kernel);
  int rounds = 16;
  launch(blocks, rounds);  // loads the kernel
  CHECK(cudaGetLastError());
  const double tried = seconds_of(card, [&] { launch(blocks, rounds); });
  rounds = static_cast<int>(std::clamp(rounds * kSeconds / std::max(tried, 1e-6), 16.0, 1e6));
  const Best best = best_of(card, [&] { launch(blocks, rounds); });
  const double each = work * rounds * blocks * kThreads / best.seconds;
  const double of_core = best.clock > 0 ? each / card.cores() / best.clock : 0;
  print(name, each, unit, of_core, best.clock);
  return best.clock;
}

void measure_copy(const Card& card) {
  size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total));
  const size_t bytes = std::min<size_t>(size_t{512} << 20, free / 4) / 4096 * 4096;
  float4 *from = nullptr, *to = nullptr;
  CHECK(cudaMalloc(&from, bytes));
  CHECK(cudaMalloc(&to, bytes));
  CHECK(cudaMemset(from, 1, bytes));
  CHECK(cudaMemset(to, 2, bytes));
  CHECK(cudaMemset(card.span, 0, sizeof(Span)));  // nobody looks at the core's clock here
  const int blocks = full_grid(card, copy);
  const auto by_kernel = [&] { copy<<<blocks, kThreads>>>(from, to, static_cast<long long>(bytes / sizeof(float4))); };
  const auto by_engine = [&] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice)); };
  by_kernel();
  by_engine();
  CHECK(cudaDeviceSynchronize());
  const double moved = 2.0 * static_cast<double>(bytes);
  const double kernel = moved / best_of(card, by_kernel).seconds, engine = moved / best_of(card, by_engine).seconds;
  print("copy", std::max(kernel, engine), "B/s");
  print("copy_kernel", kernel, "B/s");
  print("copy_size", static_cast<double>(bytes), "B");
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
}

void measure_second_cache(const Card& card) {
  const int blocks = full_grid(card, second_cache), apart = blocks * kThreads;
  // A third of it, so that what lies in the other half of a divided cache fits as well.
  const double places = card.properties.l2CacheSize / 3.0 / (sizeof(float4) * static_cast<double>(apart));
  int slots = 1;
  while (2 * slots <= places) slots *= 2;
  const size_t bytes = sizeof(float4) * static_cast<size_t>(apart) * slots;
  float4* from = nullptr;
  CHECK(cudaMalloc(&from, bytes));
  CHECK(cudaMemset(from, 0, bytes));
  rate(card, "l2", "B/s", second_cache, sizeof(float4) * static_cast<double>(kL2Loads), [&](int grid, int rounds) {
    second_cache<<<grid, kThreads>>>(rounds, from, apart, slots, card.span, card.out);
  });
  CHECK(cudaFree(from));
}

void measure_launch() {
  using Clock = std::chrono::steady_clock;
  constexpr int kLaunches = 1000, kWaits = 200;
  double launch = 1e30, wait = 1e30;
  for (int i = 0; i < kRuns; ++i) {
    CHECK(cudaDeviceSynchronize());
    auto begin = Clock::now();
    for (int k = 0; k < kLaunches; ++k) nothing<<<1, 32>>>();
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    launch = std::min(launch, std::chrono::duration<double>(Clock::now() - begin).count() / kLaunches);
    begin = Clock::now();
    for (int k = 0; k < kWaits; ++k) {
      nothing<<<1, 32>>>();
      CHECK(cudaDeviceSynchronize());
    }
    wait = std::min(wait, std::chrono::duration<double>(Clock::now() - begin).count() / kWaits);
  }
  CHECK(cudaGetLastError());
  print("launch", launch, "s");
  print("launch_and_wait", wait, "s");
}

// The name without what JSON does not take.
std::string plain(const char* name) {
  std::string kept;
  for (; *name != '\0'; ++name) {
    if (*name >= ' ' && *name != '"' && *name != '\\') kept += *name;
  }
  return kept;
}

}  // namespace

int main() {
  Card card{};
  CHECK(cudaSetDevice(0));
  CHECK(cudaGetDeviceProperties(&card.properties, 0));
  const size_t threads = static_cast<size_t>(card.cores()) * card.properties.maxThreadsPerMultiProcessor;
  CHECK(cudaMalloc(&card.span, sizeof(Span)));
  CHECK(cudaMalloc(&card.out, sizeof(float) * threads));
  CHECK(cudaEventCreate(&card.begin));
  CHECK(cudaEventCreate(&card.end));
  // An idle card runs slowly at first: keep it busy for a tenth of a second.
  const auto multiply = [&](int blocks, int rounds) {
    multiply_adds<<<blocks, kThreads>>>(rounds, 0.999f, 0.001f, card.span, card.out);
  };
  const int warm = full_grid(card, multiply_adds);
  for (double busy = 0; busy < 0.1;) busy += std::max(1e-3, seconds_of(card, [&] { multiply(warm, 2000); }));

  std::printf("{\"device\": \"%s\", \"capability\": \"%d.%d\", \"sms\": %d, \"l2_bytes\": %d, \"measures\": [",
              plain(card.properties.name).c_str(), card.properties.major, card.properties.minor, card.cores(),
              card.properties.l2CacheSize);
  const double clock = rate(card, "ffma", "1/s", multiply_adds, kFfma, multiply);
  print("clock", clock, "Hz");
  rate(card, "ex2", "1/s", exponentials, kEx2,
       [&](int blocks, int rounds) { exponentials<<<blocks, kThreads>>>(rounds, card.span, card.out); });
  rate(card, "issue", "1/s", issued, kIssued,
       [&](int blocks, int rounds) { issued<<<blocks, kThreads>>>(rounds, 0.999f, 0.001f, card.span, card.out); });
  // Instructions of a warp: their inverse a core is how many clocks one takes.
  constexpr double kWarpLoads = kLoads / 32.0;
  rate(card, "lds32_lane", "1/s", shared_word_lane, kWarpLoads,
       [&](int blocks, int rounds) { shared_word_lane<<<blocks, kThreads>>>(rounds, card.span, card.out); });
  rate(card, "lds32_uniform", "1/s", shared_word_uniform, kWarpLoads,
       [&](int blocks, int rounds) { shared_word_uniform<<<blocks, kThreads>>>(rounds, card.span, card.out); });
  rate(card, "lds128_lane", "1/s", shared_four_lane, kWarpLoads,
       [&](int blocks, int rounds) { shared_four_lane<<<blocks, kThreads>>>(rounds, card.span, card.out); });
  rate(card, "lds128_uniform", "1/s", shared_four_uniform, kWarpLoads,
       [&](int blocks, int rounds) { shared_four_uniform<<<blocks, kThreads>>>(rounds, card.span, card.out); });
  cudaFuncAttributes matrix{};
  CHECK(cudaFuncGetAttributes(&matrix, matrix_half));
  if (card.properties.major >= 8 && matrix.ptxVersion >= 80) {  // built for less, these kernels are empty
    constexpr double kHalfMacs = kMmas / 32.0 * (16 * 8 * 16), kTf32Macs = kMmas / 32.0 * (16 * 8 * 8);
    rate(card, "mma_half", "1/s", matrix_half, kHalfMacs,
         [&](int blocks, int rounds) { matrix_half<<<blocks, kThreads>>>(rounds, card.span, card.out); });
    rate(card, "mma_tf32", "1/s", matrix_tf32, kTf32Macs,
         [&](int blocks, int rounds) { matrix_tf32<<<blocks, kThreads>>>(rounds, card.span, card.out); });
  }
  measure_second_cache(card);
  measure_copy(card);
  measure_launch();
  CHECK(cudaDeviceSynchronize());
  std::printf("]}\n");
  CHECK(cudaFree(card.span));
  CHECK(cudaFree(card.out));
  return 0;
}
