// The operators of the layers around the convolutions, on CUDA. As in cuda.cpp, nothing here waits for the device.
#include <optional>
#include <string>
#include <tuple>

#include "../kernels/cuda/layers.h"
#include "cuda_common.h"
#include "layer_checks.h"
#include "library.h"

namespace swat {
namespace {

using namespace cuda_ops;

Tensor empty_bits(int64_t numel, const Tensor& like) { return empty({bit_words(numel)}, ScalarType::Long, like); }

// ---- ReLU -------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> relu(const Tensor& input) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const OnDevice device(input);
    const bool last = is_channels_last(input);
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    Tensor output = empty(sizes(input), input.scalar_type(), input, last);
    Tensor mask = empty_bits(input.numel(), input);
    check(cuda::relu<T>(read<T>(source), input.numel(), write<T>(output), write_words(mask), device.stream()), "relu");
    return {output, mask};
  });
}

Tensor relu_(Tensor input) {
  return dispatch("input", input, [&]<typename T>() {
    const OnDevice device(input);
    // The same tensor where it lies densely, else a copy to work on.
    const Tensor dense = torch::stable::contiguous(input, memory_format(is_channels_last(input)));
    Tensor mask = empty_bits(input.numel(), input);
    check(cuda::relu<T>(read<T>(dense), input.numel(), write<T>(dense), write_words(mask), device.stream()), "relu_");
    if (read<T>(dense) != read<T>(input)) torch::stable::copy_(input, dense);
    return mask;
  });
}

Tensor relu_backward(const Tensor& grad_output, const Tensor& mask, bool channels_last) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    check_relu_backward(grad_output, mask, channels_last);
    const OnDevice device(grad_output);
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(channels_last));
    Tensor grad_input = empty(sizes(grad_output), grad_output.scalar_type(), grad_output, channels_last);
    check(cuda::relu_backward<T>(read<T>(grad), read_words(mask), grad_output.numel(), write<T>(grad_input),
                                 device.stream()),
          "relu_backward");
    return grad_input;
  });
}

// ---- Batch normalisation ----------------------------------------------------------------------------------------------------

cuda::NormShape shape_of(const CheckedNorm& norm) {
  // With one pixel both layouts are the same, and neighbours in memory are channels.
  return {norm.batch, norm.channels, norm.pixels, norm.channels_last || norm.pixels == 1};
}

cuda::NormWeight weight_view(const std::optional<Tensor>& tensor, ScalarType dtype) {
  if (!tensor) return {nullptr, false};
  return {read<void>(*tensor), tensor->scalar_type() == dtype};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& input,
                                                                      const std::optional<Tensor>& weight,
                                                                      const std::optional<Tensor>& bias, double eps,
                                                                      const std::string& saved,
                                                                      const std::optional<Tensor>& seed) {
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  return dispatch("input", input, [&]<typename T>() -> Result {
    const CheckedNorm norm = check_batch_norm(input, saved, seed);
    const int64_t channels = norm.channels;
    const bool last = norm.channels_last;
    const ScalarType dtype = input.scalar_type();
    const OnDevice device(input);
    const std::optional<Tensor> weights = weights_of("weight", weight, input, channels);
    const std::optional<Tensor> biases = weights_of("bias", bias, input, channels);
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    const bool exact = norm.form == cpu::Saved::exact;
    Tensor output = empty(sizes(input), dtype, input, last);
    Tensor mean = empty({channels}, ScalarType::Double, input);
    Tensor invstd = empty({channels}, ScalarType::Double, input);
    Tensor variance = empty({channels}, ScalarType::Double, input);
    Tensor codes = empty(exact ? Ints{0} : sizes(input), code_type(norm.form, dtype), input, last && !exact);
    Tensor scale = empty({norm.form == cpu::Saved::int8 ? channels : 0}, wide(dtype), input);
    cuda::BatchNormParams<T> params{.shape = shape_of(norm),
                                    .input = read<T>(source),
                                    .weight = weight_view(weights, dtype),
                                    .bias = weight_view(biases, dtype),
                                    .eps = eps,
                                    .saved = norm.form,
                                    .seed = seed ? read<int64_t>(*seed) : nullptr,
                                    .output = write<T>(output),
                                    .mean = write<double>(mean),
                                    .invstd = write<double>(invstd),
                                    .variance = write<double>(variance),
                                    .codes = write<void>(codes),
                                    .scale = write<cuda::Compute<T>>(scale),
                                    .scratch = nullptr};
    const Tensor memory = scratch(cuda::batch_norm_scratch(params), input);
    params.scratch = write<void>(memory);
    check(cuda::batch_norm(params, device.stream()), "batch_norm");
    return {output, mean, invstd, variance, codes, scale};
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& saved,
                                                       const std::optional<Tensor>& scale, const Tensor& mean,
                                                       const Tensor& invstd, const std::optional<Tensor>& weight,
                                                       const std::string& saved_as) {
  return dispatch("grad_output", grad_output, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor> {
    const CheckedNorm norm = check_batch_norm_backward(grad_output, saved, scale, mean, invstd, saved_as);
    const int64_t channels = norm.channels;
    const bool last = norm.channels_last;
    const ScalarType dtype = grad_output.scalar_type();
    const OnDevice device(grad_output);
    const std::optional<Tensor> scales = per_channel("scale", scale, wide(dtype), channels);
    const std::optional<Tensor> weights = weights_of("weight", weight, grad_output, channels);
    const Tensor means = *per_channel("mean", mean, ScalarType::Double, channels);
    const Tensor invstds = *per_channel("invstd", invstd, ScalarType::Double, channels);
    const Tensor values = torch::stable::contiguous(saved, memory_format(last));
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(last));
    const ScalarType weight_type = weights ? weights->scalar_type() : dtype;
    Tensor grad_input = empty(sizes(saved), dtype, grad_output, last);
    Tensor grad_weight = empty({channels}, weight_type, grad_output);
    Tensor grad_bias = empty({channels}, weight_type, grad_output);
    cuda::BatchNormGradParams<T> params{.shape = shape_of(norm),
                                        .grad_output = read<T>(grad),
                                        .saved = norm.form,
                                        .values = read<void>(values),
                                        .scale = scales ? read<cuda::Compute<T>>(*scales) : nullptr,
                                        .mean = read<double>(means),
                                        .invstd = read<double>(invstds),
                                        .weight = weight_view(weights, dtype),
                                        .grad_input = write<T>(grad_input),
                                        .grad_weight = write<void>(grad_weight),
                                        .grad_bias = write<void>(grad_bias),
                                        .narrow = weight_type == dtype,
                                        .scratch = nullptr};
    const Tensor memory = scratch(cuda::batch_norm_backward_scratch(params), grad_output);
    params.scratch = write<void>(memory);
    check(cuda::batch_norm_backward(params, device.stream()), "batch_norm_backward");
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
    const OnDevice device(input);
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    Tensor output = empty(size, input.scalar_type(), input, last);
    Tensor positions = empty(size, ScalarType::Byte, input, last);
    check(cuda::max_pool<T>(shape, read<T>(source), write<T>(output), write<uint8_t>(positions), device.stream()),
          "max_pool2d");
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
    const OnDevice device(grad_output);
    const Tensor where = torch::stable::contiguous(positions, memory_format(last));
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(last));
    Tensor grad_input = empty(input_size, grad_output.scalar_type(), grad_output, last);
    check(cuda::max_pool_backward<T>(shape, read<T>(grad), read<uint8_t>(where), write<T>(grad_input), device.stream()),
          "max_pool2d_backward");
    return grad_input;
  });
}

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(SWAT_CUDA_KEY, m) {
  m.impl("relu", TORCH_BOX(&swat::relu));
  m.impl("relu_", TORCH_BOX(&swat::relu_));
  m.impl("relu_backward", TORCH_BOX(&swat::relu_backward));
  m.impl("batch_norm", TORCH_BOX(&swat::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&swat::batch_norm_backward));
  m.impl("max_pool2d", TORCH_BOX(&swat::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&swat::max_pool2d_backward));
}
