// One call of the CUDA backend: torch tensors turned into the plain `Call` that the kernels read, and its launch sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../inputs.h"
#include "call.h"
#include "device.h"
#include "shapes.h"

namespace lomix::cuda {

// What one pass asks of memory and of the launch.
struct Layout {
  Shape shape;
  int64_t shared = 0;          // bytes a block
  int most_shared = 0;         // bytes that the device gives a block
  int64_t scratch = 0;         // numbers a block
  int64_t native_partial = 0;  // numbers
  int64_t most_products = 0;   // numbers that the sums of one block take

  Memory memory() const { return {shared, most_shared}; }
};

// Everything of a call but the buffers of the pass: sizes, strides, maps, tiles, packed parameters. Owns what `call`
// points to.
template <typename T>
class Prepared {
 public:
  Prepared(const Inputs& inputs, const DeviceFacts& device);

  // Choose kernel, tiles and blocks for one pass; sets all that depends on them. Reads and writes no memory.
  Layout lay_out_forward();
  Layout lay_out_backward();
  // After that: the parameters as the kernel chosen wants them.
  void pack(const Inputs& inputs, cudaStream_t stream);

  Call<T> call{};

 private:
  void read_target(const Inputs& inputs);
  void read_scales(const Inputs& inputs);
  void read_maps(const Inputs& inputs);
  Problem problem(bool few) const;
  int64_t length() const;
  Layout lay_out(const Shape& shape, int64_t most_shared);
  void choose_tiles(const Shape& shape, int64_t most_shared);
  void share_out(const Shape& shape, int64_t item_bytes, int64_t block_bytes);

  DeviceFacts device_;
  std::vector<at::Tensor> kept_;
};

}  // namespace lomix::cuda
