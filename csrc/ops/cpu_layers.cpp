// The operators of the layers around the convolutions, on the CPU.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "../kernels/cpu/batch_norm.h"
#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/max_pool.h"
#include "../kernels/cpu/relu.h"
#include "cpu_common.h"
#include "layer_checks.h"
#include "library.h"

namespace swat {
namespace {

Tensor empty_bits(int64_t numel) { return empty({bit_words(numel)}, ScalarType::Long); }

// ---- ReLU -------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> relu(const Tensor& input) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const bool last = is_channels_last(input);
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    const int64_t numel = input.numel();
    Tensor output = empty(sizes(input), input.scalar_type(), last);
    Tensor mask = empty_bits(numel);
    cpu::relu<T>(cpu::active(), torch_threads(), source.const_data_ptr<T>(), numel, output.mutable_data_ptr<T>(),
                 write_words(mask));
    return {output, mask};
  });
}

Tensor relu_(Tensor input) {
  return dispatch("input", input, [&]<typename T>() {
    const bool last = is_channels_last(input);
    // The same tensor where it lies densely, else a copy to work on.
    const Tensor dense = torch::stable::contiguous(input, memory_format(last));
    const int64_t numel = input.numel();
    Tensor mask = empty_bits(numel);
    cpu::relu<T>(cpu::active(), torch_threads(), dense.const_data_ptr<T>(), numel, dense.mutable_data_ptr<T>(),
                 write_words(mask));
    if (dense.const_data_ptr<T>() != input.const_data_ptr<T>()) torch::stable::copy_(input, dense);
    return mask;
  });
}

Tensor relu_backward(const Tensor& grad_output, const Tensor& mask, bool channels_last) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    check_relu_backward(grad_output, mask, channels_last);
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(channels_last));
    Tensor grad_input = empty(sizes(grad_output), grad_output.scalar_type(), channels_last);
    cpu::relu_backward<T>(cpu::active(), torch_threads(), grad.const_data_ptr<T>(), read_words(mask),
                          grad_output.numel(), grad_input.mutable_data_ptr<T>());
    return grad_input;
  });
}

// ---- Batch normalisation ----------------------------------------------------------------------------------------------------

cpu::BatchNormShape shape_of(const CheckedNorm& norm) {
  return cpu::batch_norm_shape(norm.batch, norm.channels, norm.pixels, norm.channels_last);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->template const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& input,
                                                                      const std::optional<Tensor>& weight,
                                                                      const std::optional<Tensor>& bias, double eps,
                                                                      const std::string& saved,
                                                                      const std::optional<Tensor>& seed) {
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  return dispatch("input", input, [&]<typename T>() -> Result {
    const CheckedNorm norm = check_batch_norm(input, saved, seed);
    const cpu::BatchNormShape shape = shape_of(norm);
    const bool last = norm.channels_last;
    const ScalarType dtype = input.scalar_type();
    const std::optional<Tensor> weights = weights_of("weight", weight, input, shape.channels);
    const std::optional<Tensor> biases = weights_of("bias", bias, input, shape.channels);
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    const Ints size = sizes(input);
    Tensor output = empty(size, dtype, last);
    Tensor mean = empty({shape.channels}, ScalarType::Double);
    Tensor invstd = empty({shape.channels}, ScalarType::Double);
    Tensor variance = empty({shape.channels}, ScalarType::Double);
    const bool exact = norm.form == cpu::Saved::exact;
    Tensor codes = empty(exact ? Ints{0} : size, code_type(norm.form, dtype), last && !exact);
    Tensor scale = empty({norm.form == cpu::Saved::int8 ? shape.channels : 0}, dtype);
    cpu::batch_norm<T>(cpu::active(), torch_threads(), shape, source.const_data_ptr<T>(), data_or_null<T>(weights),
                       data_or_null<T>(biases), eps, norm.form, seed ? *seed->const_data_ptr<int64_t>() : 0,
                       {.output = output.mutable_data_ptr<T>(),
                        .mean = mean.mutable_data_ptr<double>(),
                        .invstd = invstd.mutable_data_ptr<double>(),
                        .variance = variance.mutable_data_ptr<double>(),
                        .codes = exact ? nullptr : codes.mutable_data_ptr(),
                        .scale = scale.mutable_data_ptr<T>()});
    return {output, mean, invstd, variance, codes, scale};
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& saved,
                                                       const std::optional<Tensor>& scale, const Tensor& mean,
                                                       const Tensor& invstd, const std::optional<Tensor>& weight,
                                                       const std::string& saved_as) {
  return dispatch("grad_output", grad_output, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor> {
    const CheckedNorm norm = check_batch_norm_backward(grad_output, saved, scale, mean, invstd, saved_as);
    const cpu::BatchNormShape shape = shape_of(norm);
    const bool last = norm.channels_last;
    const ScalarType dtype = grad_output.scalar_type();
    const std::optional<Tensor> scales = per_channel("scale", scale, dtype, shape.channels);
    const std::optional<Tensor> weights = weights_of("weight", weight, grad_output, shape.channels);
    const Tensor means = *per_channel("mean", mean, ScalarType::Double, shape.channels);
    const Tensor invstds = *per_channel("invstd", invstd, ScalarType::Double, shape.channels);
    const Tensor values = torch::stable::contiguous(saved, memory_format(last));
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(last));
    Tensor grad_input = empty(sizes(saved), dtype, last);
    Tensor grad_weight = empty({shape.channels}, dtype);
    Tensor grad_bias = empty({shape.channels}, dtype);
    cpu::batch_norm_backward<T>(cpu::active(), torch_threads(), shape, grad.const_data_ptr<T>(),
                                {.form = norm.form,
                                 .values = values.const_data_ptr(),
                                 .scale = data_or_null<T>(scales),
                                 .mean = means.const_data_ptr<double>(),
                                 .invstd = invstds.const_data_ptr<double>(),
                                 .weight = data_or_null<T>(weights)},
                                grad_input.mutable_data_ptr<T>(), grad_weight.mutable_data_ptr<T>(),
                                grad_bias.mutable_data_ptr<T>());
    return {grad_input, grad_weight, grad_bias};
  });
}

// ---- Max pooling ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, const Ints& kernel_size, const Ints& stride,
                                      const Ints& padding, const Ints& dilation, bool ceil_mode) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const bool last = is_channels_last(input);
    const auto shape = pool_shape("input", sizes(input), kernel_size, stride, padding, dilation, ceil_mode, last);
    const Ints size = pooled_size(shape);
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    Tensor output = empty(size, input.scalar_type(), last);
    Tensor positions = empty(size, ScalarType::Byte, last);
    cpu::max_pool<T>(cpu::active(), torch_threads(), shape, source.const_data_ptr<T>(), output.mutable_data_ptr<T>(),
                     positions.mutable_data_ptr<uint8_t>());
    return {output, positions};
  });
}

Tensor max_pool2d_backward(const Tensor& grad_output, const Tensor& positions, const Ints& input_size,
                           const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                           bool ceil_mode) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    const bool last = is_channels_last(positions);
    const auto shape = pool_shape("input_size", input_size, kernel_size, stride, padding, dilation, ceil_mode, last);
    check_max_pool_backward(shape, grad_output, positions);
    const Tensor where = torch::stable::contiguous(positions, memory_format(last));
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(last));
    Tensor grad_input = empty(input_size, grad_output.scalar_type(), last);
    cpu::max_pool_backward<T>(cpu::active(), torch_threads(), shape, grad.const_data_ptr<T>(),
                              where.const_data_ptr<uint8_t>(), grad_input.mutable_data_ptr<T>());
    return grad_input;
  });
}

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(CPU, m) {
  m.impl("relu", TORCH_BOX(&swat::relu));
  m.impl("relu_", TORCH_BOX(&swat::relu_));
  m.impl("relu_backward", TORCH_BOX(&swat::relu_backward));
  m.impl("batch_norm", TORCH_BOX(&swat::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&swat::batch_norm_backward));
  m.impl("max_pool2d", TORCH_BOX(&swat::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&swat::max_pool2d_backward));
}
