// The layers around the convolutions as operators: what is the same on every device. A Device has
//   dispatch(name, tensor, f)                 call f<T>() for the tensor's dtype
//   empty(size, dtype, like, channels_last)   a result on the device of `like`
//   Compute<T>                                what T is computed in
//   relu<T>, relu_backward<T>, batch_norm<T>, batch_norm_backward<T>, max_pool<T>, max_pool_backward<T>
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>

#include "images.h"
#include "layer_checks.h"
#include "library.h"

namespace swat {

template <typename Device>
struct Layers {
  // ---- ReLU -----------------------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> relu(const Tensor& input) {
    return Device::dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
      const Tensor source = dense(input);
      Tensor output = empty_as(source);
      Tensor mask = Device::empty({bit_words(input.numel())}, ScalarType::Long, input, false);
      Device::template relu<T>(input, read<T>(source), input.numel(), write<T>(output), write_words(mask));
      return {output, mask};
    });
  }

  static Tensor relu_(Tensor input) {
    return Device::dispatch("input", input, [&]<typename T>() {
      check_writable("input", input);
      Tensor source = dense(input);
      Tensor mask = Device::empty({bit_words(input.numel())}, ScalarType::Long, input, false);
      Device::template relu<T>(input, read<T>(source), input.numel(), write<T>(source), write_words(mask));
      if (read<T>(source) != read<T>(input)) torch::stable::copy_(input, source);
      return mask;
    });
  }

  static Tensor relu_backward(const Tensor& grad_output, const Tensor& mask) {
    return Device::dispatch("grad_output", grad_output, [&]<typename T>() {
      check_relu_backward(grad_output, mask);
      Tensor grad_input = empty_as(grad_output);
      Device::template relu_backward<T>(grad_output, read<T>(grad_output), read_words(mask), grad_output.numel(),
                                        write<T>(grad_input));
      return grad_input;
    });
  }

  // ---- Batch normalisation --------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& input,
                                                                               const std::optional<Tensor>& weight,
                                                                               const std::optional<Tensor>& bias,
                                                                               double eps, const std::string& saved,
                                                                               const std::optional<Tensor>& seed) {
    using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
    return Device::dispatch("input", input, [&]<typename T>() -> Result {
      using C = typename Device::template Compute<T>;
      const Saved form = saved_form("saved", saved);
      const NormShape shape = check_batch_norm(input, seed);
      const Ints size = sizes(input), channels{shape.channels};
      const bool last = shape.channels_last, exact = form == Saved::exact;
      const ScalarType dtype = input.scalar_type();
      const std::optional<Tensor> weights = weights_of("weight", weight, input, shape.channels);
      const std::optional<Tensor> biases = weights_of("bias", bias, input, shape.channels);
      const Tensor source = torch::stable::contiguous(input, memory_format(last));
      Tensor output = Device::empty(size, dtype, input, last);
      Tensor mean = Device::empty(channels, ScalarType::Double, input, false);
      Tensor invstd = Device::empty(channels, ScalarType::Double, input, false);
      Tensor variance = Device::empty(channels, ScalarType::Double, input, false);
      Tensor codes = Device::empty(exact ? Ints{0} : size, code_type(form, dtype), input, last && !exact);
      Tensor scale = Device::empty(form == Saved::int8 ? channels : Ints{0}, wide(dtype), input, false);
      Device::template batch_norm<T>(input, NormArguments<T, C>{.shape = shape,
                                                                .input = read<T>(source),
                                                                .weight = numbers(weights, dtype),
                                                                .bias = numbers(biases, dtype),
                                                                .eps = eps,
                                                                .saved = form,
                                                                .seed = seed ? read<int64_t>(*seed) : nullptr,
                                                                .output = write<T>(output),
                                                                .mean = write<double>(mean),
                                                                .invstd = write<double>(invstd),
                                                                .variance = write<double>(variance),
                                                                .codes = write<void>(codes),
                                                                .scale = write<C>(scale)});
      return {output, mean, invstd, variance, codes, scale};
    });
  }

  static std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& saved,
                                                                const std::optional<Tensor>& scale, const Tensor& mean,
                                                                const Tensor& invstd,
                                                                const std::optional<Tensor>& weight,
                                                                const std::string& saved_as) {
    return Device::dispatch("grad_output", grad_output, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor> {
      using C = typename Device::template Compute<T>;
      const Saved form = saved_form("saved_as", saved_as);
      const NormShape shape = check_batch_norm_backward(grad_output, saved, scale, mean, invstd, saved_as, form);
      const int64_t channels = shape.channels;
      const ScalarType dtype = grad_output.scalar_type();
      const std::optional<Tensor> scales = per_channel("scale", scale, wide(dtype), channels);
      const std::optional<Tensor> weights = weights_of("weight", weight, grad_output, channels);
      const Tensor means = *per_channel("mean", mean, ScalarType::Double, channels);
      const Tensor invstds = *per_channel("invstd", invstd, ScalarType::Double, channels);
      const MemoryFormat format = memory_format(shape.channels_last);
      const Tensor values = torch::stable::contiguous(saved, format);
      const Tensor grad = torch::stable::contiguous(grad_output, format);
      const ScalarType weight_type = weights ? weights->scalar_type() : dtype;
      Tensor grad_input = Device::empty(sizes(saved), dtype, grad_output, shape.channels_last);
      Tensor grad_weight = Device::empty({channels}, weight_type, grad_output, false);
      Tensor grad_bias = Device::empty({channels}, weight_type, grad_output, false);
      Device::template batch_norm_backward<T>(grad_output,
                                              NormGradArguments<T, C>{.shape = shape,
                                                                      .grad_output = read<T>(grad),
                                                                      .saved = form,
                                                                      .values = read<void>(values),
                                                                      .scale = scales ? read<C>(*scales) : nullptr,
                                                                      .mean = read<double>(means),
                                                                      .invstd = read<double>(invstds),
                                                                      .weight = numbers(weights, dtype),
                                                                      .grad_input = write<T>(grad_input),
                                                                      .grad_weight = write<void>(grad_weight),
                                                                      .grad_bias = write<void>(grad_bias),
                                                                      .narrow = weight_type == dtype});
      return {grad_input, grad_weight, grad_bias};
    });
  }

  // ---- Max pooling ----------------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, const Ints& kernel_size, const Ints& stride,
                                               const Ints& padding, const Ints& dilation, bool ceil_mode) {
    return Device::dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
      const bool last = suggests_channels_last(input);
      const auto shape = pool_shape("input", sizes(input), kernel_size, stride, padding, dilation, ceil_mode, last);
      const Tensor source = torch::stable::contiguous(input, memory_format(last));
      Tensor output = Device::empty(pooled_size(shape), input.scalar_type(), input, last);
      Tensor positions = Device::empty(pooled_size(shape), ScalarType::Byte, input, last);
      Device::template max_pool<T>(input, shape, read<T>(source), write<T>(output), write<uint8_t>(positions));
      return {output, positions};
    });
  }

  static Tensor max_pool2d_backward(const Tensor& grad_output, const Tensor& positions, const Ints& input_size,
                                    const Ints& kernel_size, const Ints& stride, const Ints& padding,
                                    const Ints& dilation, bool ceil_mode) {
    return Device::dispatch("grad_output", grad_output, [&]<typename T>() {
      const bool last = suggests_channels_last(positions);
      const auto shape = pool_shape("input_size", input_size, kernel_size, stride, padding, dilation, ceil_mode, last);
      check_max_pool_backward(shape, grad_output, positions);
      const Tensor where = torch::stable::contiguous(positions, memory_format(last));
      const Tensor grad = torch::stable::contiguous(grad_output, memory_format(last));
      Tensor grad_input = Device::empty(input_size, grad_output.scalar_type(), grad_output, last);
      Device::template max_pool_backward<T>(grad_output, shape, read<T>(grad), read<uint8_t>(where),
                                            write<T>(grad_input));
      return grad_input;
    });
  }

 private:
  // The tensor itself where its elements fill a range of memory, else a copy that does, in the order that torch would copy it.
  static Tensor dense(const Tensor& tensor) { return is_dense(tensor) ? tensor : torch::stable::clone(tensor); }

  // A tensor that lies as the dense one, with the strides that torch's elementwise operators give it.
  static Tensor empty_as(const Tensor& dense) {
    const bool last = is_channels_last_contiguous(dense);
    if (!last && !dense.is_contiguous()) return torch::stable::empty_like(dense);
    return Device::empty(sizes(dense), dense.scalar_type(), dense, last);
  }

  static NormWeight numbers(const std::optional<Tensor>& tensor, ScalarType dtype) {
    if (!tensor) return {nullptr, false};
    return {read<void>(*tensor), tensor->scalar_type() == dtype};
  }
};

template <typename Device>
void implement_layers(auto& library) {
  library.impl("relu", TORCH_BOX(&Layers<Device>::relu));
  library.impl("relu_", TORCH_BOX(&Layers<Device>::relu_));
  library.impl("relu_backward", TORCH_BOX(&Layers<Device>::relu_backward));
  library.impl("batch_norm", TORCH_BOX(&Layers<Device>::batch_norm));
  library.impl("batch_norm_backward", TORCH_BOX(&Layers<Device>::batch_norm_backward));
  library.impl("max_pool2d", TORCH_BOX(&Layers<Device>::max_pool2d));
  library.impl("max_pool2d_backward", TORCH_BOX(&Layers<Device>::max_pool2d_backward));
}

}  // namespace swat
