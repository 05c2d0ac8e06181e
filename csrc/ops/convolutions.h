// The convolutions and linear layers as operators: what is the same on every device. A Device has
//   dispatch(name, tensor, f)            call f<T>() for the tensor's dtype
//   empty(size, like, channels_last)     a result, on the device and in the dtype of `like`
//   check_packed(name, values, mask, numel, like), packed<T>(values, mask, numel)
//   convolution<T>, input_grad<T>, weight_grad<T>
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "convolution_checks.h"
#include "images.h"

namespace swat {

template <typename Device>
struct Convolutions {
  static Tensor conv2d(const Tensor& input, const Tensor& weight_values, const Tensor& weight_mask,
                       const Ints& weight_size, const std::optional<Tensor>& bias, const Ints& stride,
                       const Ints& padding, const Ints& dilation, int64_t groups, bool channels_last) {
    return Device::dispatch("input", input, [&]<typename T>() {
      const ConvGeometry g = make_geometry("input", sizes(input), weight_size, stride, padding, dilation, groups);
      Device::check_packed("weight_", weight_values, weight_mask, product(weight_size), input);
      check_bias(bias, input, g.out_channels);
      const std::optional<Tensor> offsets = dense(bias);
      Tensor output = Device::empty({g.batch, g.out_channels, g.out_height, g.out_width}, input, channels_last);
      Device::template convolution<T>(input, g, image(input, read<T>(input)),
                                      Device::template packed<T>(weight_values, weight_mask, product(weight_size)),
                                      offsets ? read<T>(*offsets) : nullptr, image(output, write<T>(output)));
      return output;
    });
  }

  static Tensor conv2d_input_grad(const Tensor& grad_output, const Tensor& weight_values, const Tensor& weight_mask,
                                  const Ints& weight_size, const Ints& input_size, const Ints& stride,
                                  const Ints& padding, const Ints& dilation, int64_t groups, bool channels_last) {
    return Device::dispatch("grad_output", grad_output, [&]<typename T>() {
      const ConvGeometry g = make_geometry("input_size", input_size, weight_size, stride, padding, dilation, groups);
      Device::check_packed("weight_", weight_values, weight_mask, product(weight_size), grad_output);
      check_size("grad_output", sizes(grad_output), {g.batch, g.out_channels, g.out_height, g.out_width});
      Tensor grad_input = Device::empty(input_size, grad_output, channels_last);
      Device::template input_grad<T>(grad_output, g, image(grad_output, read<T>(grad_output)),
                                     Device::template packed<T>(weight_values, weight_mask, product(weight_size)),
                                     image(grad_input, write<T>(grad_input)));
      return grad_input;
    });
  }

  static Tensor conv2d_weight_grad(const Tensor& grad_output, const Tensor& input_values, const Tensor& input_mask,
                                   const Ints& input_size, const Ints& weight_size, const Ints& stride,
                                   const Ints& padding, const Ints& dilation, int64_t groups, bool channels_last) {
    return Device::dispatch("grad_output", grad_output, [&]<typename T>() {
      const ConvGeometry g = make_geometry("input_size", input_size, weight_size, stride, padding, dilation, groups);
      Device::check_packed("input_", input_values, input_mask, product(input_size), grad_output);
      check_size("grad_output", sizes(grad_output), {g.batch, g.out_channels, g.out_height, g.out_width});
      Tensor grad_weight = Device::empty(weight_size, grad_output, channels_last);
      Device::template weight_grad<T>(grad_output, g, image(grad_output, read<T>(grad_output)),
                                      Device::template packed<T>(input_values, input_mask, product(input_size)),
                                      write<T>(grad_weight), channels_last);
      return grad_weight;
    });
  }

  // A linear layer is a 1x1 convolution of an image whose pixels are the rows.
  static Tensor linear(const Tensor& input, const Tensor& weight_values, const Tensor& weight_mask,
                       const Ints& weight_size, const std::optional<Tensor>& bias) {
    return Device::dispatch("input", input, [&]<typename T>() {
      check_linear("input", input, weight_size, 1);
      const int64_t numel = product(weight_size);
      Device::check_packed("weight_", weight_values, weight_mask, numel, input);
      check_bias(bias, input, weight_size[0]);
      Ints size = sizes(input);
      size.back() = weight_size[0];
      Tensor output = Device::empty(size, input, false);
      if (input.numel() == 0 || numel == 0) return bias ? torch::stable::copy_(output, *bias) : zeros(output);
      const std::optional<Tensor> offsets = dense(bias);
      const ChannelImage from = rows(input);
      Device::template convolution<T>(input, linear_geometry(from.pixels(), weight_size), from.read<T>(),
                                      Device::template packed<T>(weight_values, weight_mask, numel),
                                      offsets ? read<T>(*offsets) : nullptr, rows(output).write<T>());
      return output;
    });
  }

  static Tensor linear_input_grad(const Tensor& grad_output, const Tensor& weight_values, const Tensor& weight_mask,
                                  const Ints& weight_size) {
    return Device::dispatch("grad_output", grad_output, [&]<typename T>() {
      check_linear("grad_output", grad_output, weight_size, 0);
      const int64_t numel = product(weight_size);
      Device::check_packed("weight_", weight_values, weight_mask, numel, grad_output);
      Ints size = sizes(grad_output);
      size.back() = weight_size[1];
      Tensor grad_input = Device::empty(size, grad_output, false);
      if (grad_output.numel() == 0 || numel == 0) return zeros(grad_input);
      const ChannelImage from = rows(grad_output);
      Device::template input_grad<T>(grad_output, linear_geometry(from.pixels(), weight_size), from.read<T>(),
                                     Device::template packed<T>(weight_values, weight_mask, numel),
                                     rows(grad_input).write<T>());
      return grad_input;
    });
  }

  static Tensor linear_weight_grad(const Tensor& grad_output, const Tensor& input_values, const Tensor& input_mask,
                                   const Ints& weight_size) {
    return Device::dispatch("grad_output", grad_output, [&]<typename T>() {
      check_linear("grad_output", grad_output, weight_size, 0);
      Ints input_size = sizes(grad_output);  // of the input [..., in]; packed, it is [in, rows]
      input_size.back() = weight_size[1];
      const int64_t numel = product(input_size);
      Device::check_packed("input_", input_values, input_mask, numel, grad_output);
      Tensor grad_weight = Device::empty(weight_size, grad_output, false);
      if (grad_output.numel() == 0 || numel == 0) return zeros(grad_weight);
      const ChannelImage from = rows(grad_output);
      Device::template weight_grad<T>(grad_output, linear_geometry(from.pixels(), weight_size), from.read<T>(),
                                      Device::template packed<T>(input_values, input_mask, numel),
                                      write<T>(grad_weight), false);
      return grad_weight;
    });
  }

 private:
  // [..., features] as [1, features, 1, rows].
  static ChannelImage rows(const Tensor& tensor) { return ChannelImage(tensor, tensor.dim() - 1, 1); }
  static std::optional<Tensor> dense(const std::optional<Tensor>& bias) {
    return bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  }
  static Tensor zeros(Tensor& tensor) { return torch::stable::zero_(tensor); }
};

}  // namespace swat
