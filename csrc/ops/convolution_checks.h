// Checks of the convolutions' arguments, for the operators of every device.
#pragma once

#include "../kernels/image.h"
#include "checks.h"

namespace swat {

// Most pixels of a padded image along one axis. No coordinate is farther away, so that none wraps.
inline constexpr int64_t kMostPixels = INT32_MAX;

// Output pixels along one axis of an `input` of that size, padded by so many before and after.
inline int64_t output_pixels(const char* name, const Ints& input, int64_t axis, int64_t kernel, int64_t stride,
                             int64_t before, int64_t after, int64_t dilation) {
  const int64_t pixels = input[axis];
  STD_TORCH_CHECK(pixels <= kMostPixels && before <= kMostPixels - pixels && after <= kMostPixels - pixels - before,
                  "padding: expected an input of at most ", kMostPixels, " pixels along each axis once padded, got ",
                  before, " and ", after, " around ", pixels);
  const int64_t last = pixels + before + after - 1;
  STD_TORCH_CHECK(last >= 0 && (kernel == 1 || dilation <= last / (kernel - 1)), name,
                  ": expected at least the dilated kernel once padded, got size ", to_string(input));
  return (last - (kernel == 1 ? 0 : dilation * (kernel - 1))) / stride + 1;
}

// The geometry of a convolution of `input` size [N, C, H, W], an argument called `name`, with `weight` size [O, C / groups, kh, kw].
inline ConvGeometry make_geometry(const char* name, const Ints& input, const Ints& weight, const Ints& stride,
                                  const Ints& padding, const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.size() == 4, name, ": expected 4 dimensions [N, C, H, W], got size ", to_string(input));
  STD_TORCH_CHECK(weight.size() == 4, "weight_size: expected 4 dimensions [O, C / groups, kh, kw], got ",
                  to_string(weight));
  check_extents(name, input);
  check_extents("weight_size", weight);
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                  "stride: expected two integers of at least 1, got ", to_string(stride));
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0,
                  "dilation: expected two integers of at least 1, got ", to_string(dilation));
  STD_TORCH_CHECK(padding.size() == 4 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "padding: expected four integers of at least 0, got ", to_string(padding));
  STD_TORCH_CHECK(groups > 0, "groups: expected at least 1, got ", groups);
  STD_TORCH_CHECK(weight[0] > 0 && weight[1] > 0 && weight[2] > 0 && weight[3] > 0,
                  "weight_size: expected no empty dimension, got ", to_string(weight));
  STD_TORCH_CHECK(weight[0] % groups == 0, "weight_size: expected output channels divisible by groups = ", groups,
                  ", got ", weight[0]);
  STD_TORCH_CHECK(input[1] % groups == 0 && input[1] / groups == weight[1], name, ": expected ", weight[1],
                  " channels in each of ", groups, " groups, got ", input[1]);
  ConvGeometry g;
  g.batch = input[0];
  g.groups = groups;
  g.in_channels = input[1];
  g.in_height = input[2];
  g.in_width = input[3];
  g.out_channels = weight[0];
  g.kernel_height = weight[2];
  g.kernel_width = weight[3];
  g.pad_top = padding[0];
  g.pad_left = padding[2];
  g.out_height = output_pixels(name, input, 2, weight[2], stride[0], padding[0], padding[1], dilation[0]);
  g.out_width = output_pixels(name, input, 3, weight[3], stride[1], padding[2], padding[3], dilation[1]);
  // A step past the padded image, or between the taps of one, leads nowhere: kept small, it cannot wrap.
  g.stride_height = std::min(stride[0], kMostPixels);
  g.stride_width = std::min(stride[1], kMostPixels);
  g.dilation_height = std::min(dilation[0], kMostPixels);
  g.dilation_width = std::min(dilation[1], kMostPixels);
  check_extents("padding: output", {g.batch, g.out_channels, g.out_height, g.out_width});
  return g;
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& input, int64_t channels) {
  if (!bias) return;
  check_same_dtype("bias", *bias, input);
  check_same_device("bias", *bias, input);
  check_size("bias", sizes(*bias), {channels});
}

// That the last dimension of `tensor` is the weight's number `axis`: 1 of an input, 0 of an output.
inline void check_linear(const char* name, const Tensor& tensor, const Ints& weight_size, int64_t axis) {
  STD_TORCH_CHECK(weight_size.size() == 2, "weight_size: expected [out, in], got ", to_string(weight_size));
  check_extents("weight_size", weight_size);
  STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) == weight_size[axis], name,
                  ": expected a last dimension of ", weight_size[axis], ", got size ", to_string(sizes(tensor)));
}

// [1, in, 1, rows] with a weight [out, in, 1, 1], none of them 0.
inline ConvGeometry linear_geometry(int64_t rows, const Ints& weight_size) {
  return make_geometry("input", {1, weight_size[1], 1, rows}, {weight_size[0], weight_size[1], 1, 1}, {1, 1},
                       {0, 0, 0, 0}, {1, 1}, 1);
}

}  // namespace swat
