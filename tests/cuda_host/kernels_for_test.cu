// Small kernels for test_cuda_host_machine.py. The first argument names a check; most print "right" or "wrong".
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"

namespace lomix::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFU;

struct Out {
  int* values;
  int option;
};

#define SHARED_INTS                                              \
  extern __shared__ __align__(16) unsigned char shared_memory[]; \
  int* const shared = reinterpret_cast<int*>(shared_memory);     \
  const int thread = static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x)

// Everybody reads what another thread wrote; option 1 leaves out what orders the two.
__global__ void __launch_bounds__(256) over_the_block(const __grid_constant__ Out out) {
  SHARED_INTS;
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  shared[thread] = thread;
  if (out.option == 0) __syncthreads();
  out.values[thread] = shared[threads - 1 - thread];
}

__global__ void over_the_warp(Out out) {
  SHARED_INTS;
  shared[thread] = thread;
  if (out.option == 0) __syncwarp();
  out.values[thread] = shared[thread ^ 31];
}

__global__ void some_leave(Out out) {
  SHARED_INTS;
  if (thread % 3 == 0) return;
  shared[thread] = 7 * thread;
  __syncthreads();
  const int other = thread % 3 == 1 ? thread + 1 : thread - 1;
  out.values[thread] = shared[other];
}

__global__ void barrier_votes(Out out) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= 60) return;
  for (int round = 0; round < 8; ++round) {  // all, none, or a part of the threads say yes
    const int yes = round == 0 || (round > 1 && thread % round == 0) ? 5 : 0;
    const int expected = round == 0 ? 60 : round == 1 ? 0 : (59 / round + 1);
    const bool right = __syncthreads_count(yes) == expected && (__syncthreads_or(yes) != 0) == (expected > 0) &&
                       (__syncthreads_and(yes) != 0) == (expected == 60);
    out.values[thread] += right;
  }
}

__global__ void warp_votes(Out out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned half = lane < 16 ? 0xFFFFU : 0xFFFF0000U;  // the halves of a warp vote apart
  const unsigned odd = __ballot_sync(half, lane & 1);
  bool right = odd == (0xAAAAAAAAU & half);
  right = right && __ballot_sync(kAll, lane == 5 ? -1 : 0) == 1U << 5;
  right = right && __any_sync(kAll, lane == 31) == 1 && __any_sync(half, 0) == 0;
  right = right && __all_sync(kAll, lane + 1) == 1 && __all_sync(kAll, lane) == 0 &&
          __all_sync(half, lane < 16) == (lane < 16);
  out.values[threadIdx.x] = right;
}

// What a lane should read, as CUDA's manual words it.
int lane_read(int kind, int lane, int operand, int width) {
  const int first = lane / width * width;
  switch (kind) {
    case 0: return first + operand % width;
    case 1: return lane - operand < first ? lane : lane - operand;
    case 2: return lane + operand >= first + width ? lane : lane + operand;
    default: return (lane ^ operand) >= first + width ? lane : lane ^ operand;
  }
}

template <class T>
T value_of(int lane, int round) {
  return static_cast<T>(static_cast<T>(lane * 1000 + round) * static_cast<T>(1.5) *
                        static_cast<T>(sizeof(T) == 8 ? 1e12 : 1));
}

template <class T>
__device__ bool shuffles_of(int lane) {
  bool right = true;
  int round = 0;
  for (int width : {32, 8, 1}) {
    for (int operand : {0, 1, 3, 16, 31}) {
      const T value = value_of<T>(lane, ++round);
      const T got[] = {__shfl_sync(kAll, value, operand, width), __shfl_up_sync(kAll, value, operand, width),
                       __shfl_down_sync(kAll, value, operand, width), __shfl_xor_sync(kAll, value, operand, width)};
      for (int kind = 0; kind < 4; ++kind) {
        right = right && got[kind] == value_of<T>(lane_read(kind, lane, operand, width), round);
      }
    }
  }
  return right;
}

__global__ void shuffles(Out out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool right = shuffles_of<int>(lane) && shuffles_of<unsigned>(lane) && shuffles_of<long long>(lane);
  right = right && shuffles_of<float>(lane) && shuffles_of<double>(lane);
  if (lane % 4 == 1) {  // the operand may differ by lane, and some lanes may stay away
    const int operand = lane == 1 ? 29 : 1;
    right = right && __shfl_sync(0x22222222U, lane, operand) == operand;
  }
  out.values[threadIdx.x] = right;
}

// Large enough a frame to stumble over marks of ASan's that earlier ones left behind.
template <int kSize>
__global__ void uses_its_stack(Out out) {
  int local[kSize];
  int* volatile hidden = local;
  for (int i = 0; i < kSize; ++i) hidden[i] = i;
  __syncthreads();
  out.values[threadIdx.x] += hidden[kSize - 1];
}

__global__ void goes_wrong(Out out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int sum[4096] = {};  // deep enough that only fibers which are given up leave marks there
  int* volatile local = sum;
  switch (out.option) {
    case 0:  // a barrier in one branch
      if (lane < 16) __syncthreads();
      if (lane >= 16) __syncwarp();
      break;
    case 1: lane < 8 ? __syncthreads() : void(__syncthreads_or(1)); break;
    case 2: *local += lane < 16 ? __shfl_up_sync(kAll, lane, 1) : __shfl_down_sync(kAll, lane, 1); break;
    case 3: *local += lane < 16 ? __shfl_sync(kAll, lane, 1) : __shfl_sync(0xFFFF0000U, lane, 20); break;
    case 4: __syncwarp(0xFFU); break;
    case 5:
      if (lane == 3) return;
      __syncthreads();
      __syncwarp();
      break;
    case 6:
      if (lane < 8) *local += __shfl_sync(0xFFU, lane, 8);
      break;
    case 7: *local += __shfl_sync(kAll, lane, 1, 12); break;
    case 8:
      __syncthreads();
      if (threadIdx.x == 9) throw std::logic_error("thrown by thread 9");
      __syncthreads();
      break;
    default: *local += lane < 16 ? static_cast<int>(__shfl_sync(kAll, 1.0, 0)) : __shfl_sync(kAll, 1, 0);
  }
}

// Blocks and threads note when they come.
__global__ void order(Out out) {
  for (int i = 0; i < 3; ++i) {
    const int place = atomicAdd(out.values, 1);
    out.values[1 + place] = static_cast<int>(blockIdx.x * 100 + threadIdx.x);
    __syncwarp();
  }
}

// Byte `option` of dynamic shared memory is read, or one past a local array for -1.
__global__ void reaches_out(Out out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  int local[4] = {1, 2, 3, 4};
  int* volatile hidden = local;  // so that the compiler does not know better
  __syncthreads();               // seen from a fiber that has waited
  out.values[threadIdx.x] = out.option < 0 ? hidden[4] : shared_memory[out.option];
}

// What the last block left in shared memory must be gone.
__global__ void unwritten(Out out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* const floats = reinterpret_cast<float*>(shared_memory);
  out.values[blockIdx.x] = isnan(floats[3]);
  floats[3] = 1;
}

__global__ void places(Out out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const bool inside = threadIdx.x < blockDim.x && threadIdx.y < blockDim.y && threadIdx.z < blockDim.z &&
                      blockIdx.x < gridDim.x && blockIdx.y < gridDim.y && blockIdx.z < gridDim.z;
  out.values[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += inside;
}

__global__ void nothing(Out) {}

void launch(void (*kernel)(Out), dim3 grid, dim3 block, std::size_t shared, Out out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, out);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

bool all_are(const std::vector<int>& values, int value) {
  for (const int v : values) {
    if (v != value) return false;
  }
  return true;
}

bool codes() {
  const auto code = [](dim3 grid, dim3 block, std::size_t shared, void (*kernel)(Out) = nothing) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Out{nullptr, 0});
    if (cudaPeekAtLastError() != error || cudaGetLastError() != error || cudaGetLastError() != cudaSuccess)
      std::abort();
    return error;
  };
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  bool right = code(1, 1, 49152) == cudaSuccess && code(1, 1, 49153) == cudaErrorInvalidValue;
  right = right && cudaFuncSetAttribute(nothing, attribute, 100000) == cudaSuccess;
  right = right && code(1, 1, 100000) == cudaSuccess && code(1, 1, 100001) == cudaErrorInvalidValue;
  right = right && code(1, 1, 100000, order) == cudaErrorInvalidValue;  // each kernel has its own
  right = right && cudaFuncSetAttribute(nothing, attribute, 232449) == cudaErrorInvalidValue;
  right = right && cudaGetLastError() == cudaErrorInvalidValue;
  right = right && cudaFuncSetAttribute(nothing, attribute, 232448) == cudaSuccess && code(1, 1, 232448) == cudaSuccess;
  for (const dim3 zero : {dim3(0), dim3(1, 0), dim3(1, 1, 0)}) {
    right = right && code(zero, 32, 0) == cudaErrorInvalidConfiguration;
    right = right && code(1, zero, 0) == cudaErrorInvalidConfiguration;
  }
  right = right && code(1, dim3(32, 32), 0) == cudaSuccess && code(1, dim3(33, 32), 0) == cudaErrorInvalidConfiguration;
  return right && code(dim3(1, 65536), 1, 0) == cudaErrorInvalidConfiguration;
}

bool arithmetic() {
  bool right = true;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {  // every value survives the way there and back
    const auto word = static_cast<unsigned short>(bits);
    const float half = __half2float(__ushort_as_half(word)), brain = __bfloat162float(__ushort_as_bfloat16(word));
    right = right && (isnan(half) || __half_as_ushort(__float2half_rn(half)) == word);
    right = right && (isnan(brain) || __bfloat16_as_ushort(__float2bfloat16_rn(brain)) == word);
    right = right && (!isnan(brain) || isnan(__bfloat162float(__float2bfloat16_rn(brain))));
  }
  const auto brain = [](float value) { return __bfloat162float(__float2bfloat16_rn(value)); };
  const auto half = [](float value) { return __half2float(__float2half_rn(value)); };
  right = right && half(2049) == 2048 && half(2051) == 2052 && half(65504) == 65504 && half(65520) == INFINITY;
  right = right && brain(257) == 256 && brain(259) == 260 && brain(3.4e38F) == INFINITY;
  right = right && isnan(brain(__uint_as_float(0x7F800001U)));  // all its set bits are dropped
  right = right && __ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1LL << 40) == 41 && __popc(0xF0F0U) == 8;
  right = right && __clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __umulhi(0x80000000U, 6) == 3;
  right = right && min(-1, 2) == -1 && max(1U, 3U) == 3 && min(NAN, 2.F) == 2 && max(1LL, 5LL) == 5 && max(1., 2.) == 2;
  right = right && __expf(0) == 1 && __log2f(8) == 3 && __logf(1) == 0 && __fdividef(1, 4) == 0.25F;
  right = right && __frcp_rn(8) == 0.125F && __fmaf_rn(2, 3, 4) == 10 && __fmul_rn(2, 3) == 6 && __fadd_rn(2, 3) == 5;
  right = right && __float_as_int(1.F) == 0x3F800000 && __int_as_float(0x40000000) == 2 &&
          __float_as_uint(-0.F) == 1U << 31;
  int i = 0x7FFFFFFF;
  unsigned u = 6;
  unsigned long long w = ~0ULL;
  right = right && atomicAdd(&i, 1) == 0x7FFFFFFF && i == -0x7FFFFFFF - 1 && atomicMax(&i, 5) < 0 && i == 5;
  right =
      right && atomicMin(&i, 3) == 5 && i == 3 && atomicOr(&i, 8) == 3 && i == 11 && atomicExch(&i, 2) == 11 && i == 2;
  right = right && atomicAdd(&u, 3U) == 6 && u == 9 && atomicOr(&u, 6U) == 9 && u == 15 && atomicAdd(&w, 2ULL) != 0 &&
          w == 1;
  right = right && sizeof(float4) == 16 && alignof(float4) == 16 && alignof(double2) == 16 && alignof(int2) == 8;
  right = right && __ldg(&u) == 15 && cudaMemsetAsync(&u, 1, sizeof u, nullptr) == cudaSuccess && u == 0x01010101U;
  return right;
}

// Of the process's address space, in which ASan keeps what it has for each fiber that has not ended.
long pages_after_failures() {
  std::vector<int> values(256, 0);
  for (int i = 0; i < 5; ++i) {
    try {
      launch(goes_wrong, 1, 64, 0, {values.data(), i});
    } catch (const std::runtime_error&) {
      continue;
    }
    std::abort();
  }
  long pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages;
}

bool on_the_host(const std::string& what) {
  if (what == "codes") return codes();
  if (what == "arithmetic") return arithmetic();
  throw std::invalid_argument(what);
}

int run(const std::string& what, int option) {
  std::vector<int> values(256, 0);
  bool right = true;
  if (what == "over_the_block") {
    launch(over_the_block, 1, dim3(16, 16), 1024, {values.data(), option});
    for (int i = 0; i < 256; ++i) right = right && values[i] == 255 - i;
  } else if (what == "over_the_warp") {
    launch(over_the_warp, 1, 256, 1024, {values.data(), option});
    for (int i = 0; i < 256; ++i) right = right && values[i] == (i ^ 31);
  } else if (what == "some_leave") {
    launch(some_leave, 3, 255, 1020, {values.data(), 0});
    for (int i = 0; i < 255; ++i) right = right && values[i] == 7 * (i % 3 == 0 ? 0 : i % 3 == 1 ? i + 1 : i - 1);
  } else if (what == "barrier_votes") {
    launch(barrier_votes, 1, 64, 0, {values.data(), 0});
    values.resize(60);
    right = all_are(values, 8);
  } else if (what == "warp_votes" || what == "shuffles") {
    launch(what == "shuffles" ? shuffles : warp_votes, 1, 256, 0, {values.data(), 0});
    right = all_are(values, 1);
  } else if (what == "uses_its_stack") {
    launch(uses_its_stack<256>, 1, 256, 0, {values.data(), 0});
    launch(uses_its_stack<1024>, 1, 256, 0, {values.data(), 0});
    launch(uses_its_stack<8192>, 1, 256, 0, {values.data(), 0});
    right = all_are(values, 255 + 1023 + 8191);
  } else if (what == "keeps_nothing") {
    const long before = pages_after_failures();
    right = pages_after_failures() - before < 1000;
  } else if (what == "places") {
    values.assign(2 * 3 * 4 * 5 * 6 * 7, 0);
    launch(places, dim3(2, 3, 4), dim3(5, 6, 7), 0, {values.data(), 0});
    right = all_are(values, 1);
    values.assign(3 * 1024, 0);
    launch(places, 3, 1024, 0, {values.data(), 0});
    right = right && all_are(values, 1);
  } else if (what == "unwritten") {
    values.resize(9);
    launch(unwritten, 9, 1, 16, {values.data(), 0});
    right = all_are(values, 1);
  } else if (what == "reaches_out") {
    launch(reaches_out, 2, 64, 101, {values.data(), option});
  } else if (what == "order") {
    values.assign(1 + 4 * 32 * 3, 0);
    launch(order, 4, 32, 0, {values.data(), 0});
    for (const int value : values) std::printf("%d ", value);
  } else if (what == "goes_wrong") {
    try {
      launch(goes_wrong, 2, 64, 0, {values.data(), option});
    } catch (const std::exception& error) {
      std::puts(error.what());
      return run("uses_its_stack", 0);  // the machine can be used again
    }
  } else {
    right = on_the_host(what);
  }
  std::puts(right ? "right" : "wrong");
  return 0;
}

}  // namespace
}  // namespace lomix::cuda

int main(int count, char** arguments) {
  if (count < 2) return 2;
  try {
    return lomix::cuda::run(arguments[1], count > 2 ? std::atoi(arguments[2]) : 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
