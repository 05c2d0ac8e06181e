// The operators of the layers around the convolutions, on the CPU.
#include "../kernels/cpu/batch_norm.h"
#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/max_pool.h"
#include "../kernels/cpu/relu.h"
#include "cpu_common.h"
#include "cpu_half.h"
#include "layers.h"

namespace swat {
namespace {

// See layers.h.
struct CpuLayers {
  template <typename T>
  using Compute = T;

  template <typename F>
  static auto dispatch(const char* name, const Tensor& tensor, F&& f) {
    return swat::dispatch(name, tensor, f);
  }
  static Tensor empty(const Ints& size, ScalarType dtype, const Tensor&, bool channels_last) {
    return swat::empty(size, dtype, channels_last);
  }
  template <typename T>
  static void relu(const Tensor&, const T* input, int64_t numel, T* output, uint64_t* words) {
    cpu::relu<T>(cpu::active(), torch_threads(), input, numel, output, words);
  }
  template <typename T>
  static void relu_backward(const Tensor&, const T* grad_output, const uint64_t* words, int64_t numel, T* grad_input) {
    cpu::relu_backward<T>(cpu::active(), torch_threads(), grad_output, words, numel, grad_input);
  }
  template <typename T>
  static void batch_norm(const Tensor&, const NormArguments<T, T>& arguments) {
    cpu::batch_norm<T>(cpu::active(), torch_threads(), arguments);
  }
  template <typename T>
  static void batch_norm_backward(const Tensor&, const NormGradArguments<T, T>& arguments) {
    cpu::batch_norm_backward<T>(cpu::active(), torch_threads(), arguments);
  }
  template <typename T>
  static void max_pool(const Tensor&, const MaxPoolShape& shape, const T* input, T* output, uint8_t* positions) {
    cpu::max_pool<T>(cpu::active(), torch_threads(), shape, input, output, positions);
  }
  template <typename T>
  static void max_pool_backward(const Tensor&, const MaxPoolShape& shape, const T* grad_output,
                                const uint8_t* positions, T* grad_input) {
    cpu::max_pool_backward<T>(cpu::active(), torch_threads(), shape, grad_output, positions, grad_input);
  }
};

using OnCpu = Layers<CpuLayers>;

// The operators that InFloat does not fit: they write to an argument, or only some of what they take and give is half.

Tensor relu_in_place(Tensor input) {
  if (!is_half(input.scalar_type())) return OnCpu::relu_(input);
  check_writable("input", input);
  const auto [output, mask] = OnCpu::relu(widened(input));
  torch::stable::copy_(input, output);
  return mask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& input,
                                                                      const std::optional<Tensor>& weight,
                                                                      const std::optional<Tensor>& bias, double eps,
                                                                      const std::string& saved,
                                                                      const std::optional<Tensor>& seed) {
  const ScalarType dtype = input.scalar_type();
  if (!is_half(dtype)) return OnCpu::batch_norm(input, weight, bias, eps, saved, seed);
  auto results = narrowed(
      OnCpu::batch_norm(widened(input), widened_if(weight, dtype), widened_if(bias, dtype), eps, saved, seed), dtype);
  if (saved == "exact") std::get<4>(results) = empty({0}, dtype);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& saved,
                                                       const std::optional<Tensor>& scale, const Tensor& mean,
                                                       const Tensor& invstd, const std::optional<Tensor>& weight,
                                                       const std::string& saved_as) {
  const ScalarType dtype = grad_output.scalar_type();
  if (!is_half(dtype)) return OnCpu::batch_norm_backward(grad_output, saved, scale, mean, invstd, weight, saved_as);
  const bool exact = saved_as == "exact";
  if (exact) check_same_dtype("saved", saved, grad_output);
  auto results = narrowed(OnCpu::batch_norm_backward(widened(grad_output), exact ? widened(saved) : saved, scale, mean,
                                                     invstd, widened_if(weight, dtype), saved_as),
                          dtype);
  if (!weight || weight->scalar_type() == dtype) {
    std::get<1>(results) = narrowed(std::get<1>(results), dtype);
    std::get<2>(results) = narrowed(std::get<2>(results), dtype);
  }
  return results;
}

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(CPU, m) {
  using swat::InFloat, swat::OnCpu;
  m.impl("relu", TORCH_BOX(&InFloat<&OnCpu::relu>::call));
  m.impl("relu_", TORCH_BOX(&swat::relu_in_place));
  m.impl("relu_backward", TORCH_BOX(&InFloat<&OnCpu::relu_backward>::call));
  m.impl("batch_norm", TORCH_BOX(&swat::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&swat::batch_norm_backward));
  m.impl("max_pool2d", TORCH_BOX(&InFloat<&OnCpu::max_pool2d>::call));
  m.impl("max_pool2d_backward", TORCH_BOX(&InFloat<&OnCpu::max_pool2d_backward>::call));
}
