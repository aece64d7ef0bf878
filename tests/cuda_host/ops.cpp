// The CUDA backend as ops on CPU tensors, torch.ops.lomix_fast_cuda_host: csrc/cuda compiled for execution on the host.
#include <torch/library.h>

#include "cuda/map_stats.h"
#include "cuda/prepare.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> forward(at::TensorList logits, const at::Tensor& target,
                                           const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                           const OptionalTensor& awf_weight, const OptionalTensor& awf_bias,
                                           at::IntArrayRef maps, bool squared) {
  return lomix::cuda::map_stats_forward({logits, target, cat_weight, cat_bias, awf_weight, awf_bias, maps, squared});
}

std::vector<at::Tensor> backward(const at::Tensor& grad_stats, at::TensorList logits, const at::Tensor& target,
                                 const OptionalTensor& cat_weight, const OptionalTensor& cat_bias,
                                 const OptionalTensor& awf_weight, const OptionalTensor& awf_bias, at::IntArrayRef maps,
                                 bool squared) {
  return lomix::cuda::map_stats_backward(grad_stats,
                                         {logits, target, cat_weight, cat_bias, awf_weight, awf_bias, maps, squared});
}

// How a call is laid out on the device as it is now: log2 of a tile's sizes, strips, chunks, tiles of a chunk, items,
// blocks, bytes of shared memory of a block.
std::vector<int64_t> layout(at::TensorList logits, const at::Tensor& target, at::IntArrayRef maps, bool is_backward) {
  const OptionalTensor none;
  lomix::cuda::Prepared<float> prepared({logits, target, none, none, none, none, maps, true},
                                        lomix::cuda::facts(target.device()));
  const lomix::cuda::Layout made = is_backward ? prepared.lay_out_backward() : prepared.lay_out_forward();
  const lomix::cuda::Tiling& tiling = prepared.call.tiling;
  return {tiling.log_size[0], tiling.log_size[1], tiling.log_size[2], tiling.strips, tiling.chunks,
          tiling.chunk_tiles, tiling.items,       tiling.blocks,      made.shared};
}

}  // namespace

TORCH_LIBRARY(lomix_fast_cuda_host, m) {
  m.def(
      "map_stats_forward(Tensor[] logits, Tensor target, Tensor? cat_weight, Tensor? cat_bias, Tensor? awf_weight, "
      "Tensor? awf_bias, int[] maps, bool squared) -> (Tensor, Tensor)");
  m.def(
      "map_stats_backward(Tensor grad_stats, Tensor[] logits, Tensor target, Tensor? cat_weight, Tensor? cat_bias, "
      "Tensor? awf_weight, Tensor? awf_bias, int[] maps, bool squared) -> Tensor[]");
  m.def("layout(Tensor[] logits, Tensor target, int[] maps, bool is_backward) -> int[]");
}

TORCH_LIBRARY_IMPL(lomix_fast_cuda_host, CPU, m) {
  m.impl("map_stats_forward", &forward);
  m.impl("map_stats_backward", &backward);
  m.impl("layout", &layout);
}
