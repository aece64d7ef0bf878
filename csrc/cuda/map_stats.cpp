// Allocates what a call needs and launches its kernels, on torch's current stream and without waiting for it.
#include "map_stats.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "prepare.h"

namespace lomix::cuda {
namespace {

// A buffer for the length of a call: torch's allocator keeps its memory for later work of the same stream.
template <typename T>
T* room_for(std::vector<at::Tensor>& kept, int64_t count, const at::TensorOptions& options) {
  kept.push_back(at::empty({std::max<int64_t>(count, 1)}, options.dtype(c10::CppTypeToScalarType<T>::value)));
  return kept.back().template mutable_data_ptr<T>();
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> forward(const Inputs& inputs) {
  const at::Tensor& first = inputs.logits[0];
  const auto options = first.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t B = first.size(0), C = first.size(1), M = static_cast<int64_t>(inputs.maps.size() / 4);
  at::Tensor stats = at::empty({B, M, 1 + 2 * C}, options), target_stats = at::empty({B, 1 + C}, options);
  if (B == 0 || M == 0) return {stats, target_stats.zero_()};
  const OnDevice here(first.device());
  Prepared<T> prepared(inputs, facts(first.device()));
  Call<T>& call = prepared.call;
  const Layout layout = prepared.lay_out_forward();
  prepared.pack(inputs, here.stream());
  std::vector<at::Tensor> kept;
  call.partial = room_for<T>(kept, call.tiling.items * M * (1 + 2 * C), options);
  call.counts = room_for<int>(kept, call.tiling.items * (1 + C), options);
  call.scratch = room_for<T>(kept, call.tiling.blocks * layout.scratch, options);
  check(launch_statistics(call, layout.memory(), here.stream()), "launching the statistics");
  check(finish_statistics(call, stats.mutable_data_ptr<T>(), target_stats.mutable_data_ptr<T>(), here.stream()),
        "launching the sum of the statistics");
  return {stats, target_stats};
}

template <typename T>
std::vector<at::Tensor> backward(const at::Tensor& grad_stats, const Inputs& inputs) {
  const at::Tensor& first = inputs.logits[0];
  const auto options = first.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t B = first.size(0), C = first.size(1), M = static_cast<int64_t>(inputs.maps.size() / 4);
  TORCH_CHECK_VALUE(grad_stats.sizes() == at::IntArrayRef({B, M, 1 + 2 * C}), "grad_stats: got shape ",
                    grad_stats.sizes(), ", expected [", B, ", ", M, ", ", 1 + 2 * C, "]");
  TORCH_CHECK_VALUE(grad_stats.device() == first.device(), "grad_stats: got a tensor on ", grad_stats.device(),
                    ", expected one on ", first.device(), " as the logits are");
  std::vector<at::Tensor> parameters;
  for (const auto* given : {&inputs.cat_weight, &inputs.cat_bias, &inputs.awf_weight, &inputs.awf_bias}) {
    parameters.push_back(given->has_value() ? at::zeros((*given)->sizes(), options) : at::empty({0}, options));
  }
  std::vector<at::Tensor> outputs;
  if (B == 0 || M == 0) {
    for (const at::Tensor& z : inputs.logits) outputs.push_back(at::zeros_like(z));
    outputs.insert(outputs.end(), parameters.begin(), parameters.end());
    return outputs;
  }
  const OnDevice here(first.device());
  Prepared<T> prepared(inputs, facts(first.device()));
  Call<T>& call = prepared.call;
  const Layout layout = prepared.lay_out_backward();
  prepared.pack(inputs, here.stream());
  for (int l = 0; l < call.num_scales; ++l) {
    const at::Tensor& z = inputs.logits[l];
    Scale& scale = call.scales[l];
    at::Tensor out = scale.used ? at::empty_like(z) : at::zeros_like(z);
    const std::array<int64_t, 3> stride = as_zyx(out.strides(), 2, 0);
    scale.grad = out.mutable_data_ptr();
    scale.grad_stride[0] = out.stride(0);
    scale.grad_stride[1] = out.stride(1);
    std::copy(stride.begin(), stride.end(), scale.grad_stride + 2);
    outputs.push_back(out);
  }
  std::vector<at::Tensor> kept{grad_stats.to(options).contiguous()};
  call.grad_stats = kept[0].const_data_ptr<T>();
  int* const bad = room_for<int>(kept, B, options);
  call.bad = bad;
  call.native_partial = room_for<T>(kept, layout.native_partial, options);
  call.products = room_for<T>(kept, call.tiling.blocks * layout.most_products, options);
  call.scratch = room_for<T>(kept, call.tiling.blocks * layout.scratch, options);
  const auto data = [](const at::Tensor& t) { return t.numel() == 0 ? nullptr : t.mutable_data_ptr<T>(); };
  check(find_bad_labels(call, bad, here.stream()), "launching the search for bad labels");
  check(launch_gradients(call, layout.memory(), here.stream()), "launching the gradients");
  check(gather_gradients(call, here.stream()), "launching the sum of the gradients");
  check(finish_parameters(call, data(parameters[0]), data(parameters[1]), data(parameters[2]), data(parameters[3]),
                          here.stream()),
        "launching the sum of the parameters' gradients");
  outputs.insert(outputs.end(), parameters.begin(), parameters.end());
  return outputs;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> map_stats_forward(const Inputs& inputs) {
  check_inputs(inputs);
  return inputs.logits[0].scalar_type() == at::kDouble ? forward<double>(inputs) : forward<float>(inputs);
}

std::vector<at::Tensor> map_stats_backward(const at::Tensor& grad_stats, const Inputs& inputs) {
  check_inputs(inputs);
  return inputs.logits[0].scalar_type() == at::kDouble ? backward<double>(grad_stats, inputs)
                                                       : backward<float>(grad_stats, inputs);
}

}  // namespace lomix::cuda
