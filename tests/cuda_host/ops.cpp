// The CUDA backend as ops on CPU tensors, torch.ops.lomix_fast_cuda_host: csrc/cuda compiled for execution on the host.
#include "ops.h"

#include <torch/library.h>

#include "cuda/map_stats.h"
#include "cuda/prepare.h"

namespace {

// How a call is laid out on the device as it is now: log2 of a tile's sizes, strips, chunks, tiles of a chunk, items,
// blocks, bytes of shared memory of a block. Of the parameters only u has to be there, for the number of pairs.
std::vector<int64_t> layout(at::TensorList logits, const at::Tensor& target, const lomix::OptionalTensor& awf_weight,
                            at::IntArrayRef maps, bool is_backward) {
  const lomix::OptionalTensor none;
  lomix::cuda::Prepared<float> prepared(
      {logits, target, none, none, none, none, awf_weight, none, maps, {true, false, false, true, {}, 0}},
      lomix::cuda::facts(target.device()));
  const lomix::cuda::Layout made = is_backward ? prepared.lay_out_backward() : prepared.lay_out_forward();
  const lomix::cuda::Tiling& tiling = prepared.call.tiling;
  return {tiling.log_size[0], tiling.log_size[1], tiling.log_size[2], tiling.strips, tiling.chunks,
          tiling.chunk_tiles, tiling.items,       tiling.blocks,      made.shared};
}

}  // namespace

TORCH_LIBRARY(lomix_fast_cuda_host, m) {
  m.def(lomix::kForwardSchema);
  m.def(lomix::kBackwardSchema);
  m.def("layout(Tensor[] logits, Tensor target, Tensor? awf_weight, int[] maps, bool is_backward) -> int[]");
}

TORCH_LIBRARY_IMPL(lomix_fast_cuda_host, CPU, m) {
  m.impl("map_stats_forward", &lomix::forward_op<lomix::cuda::map_stats_forward>);
  m.impl("map_stats_backward", &lomix::backward_op<lomix::cuda::map_stats_backward>);
  m.impl("layout", &layout);
}
