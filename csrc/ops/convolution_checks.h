// Checks of the convolutions' arguments, for the operators of every device.
#pragma once

#include "../kernels/image.h"
#include "checks.h"

namespace swat {

// The geometry of a convolution of `input` size [N, C, H, W] with `weight` size [O, C / groups, kh, kw].
inline ConvGeometry make_geometry(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
                                  const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.size() == 4, "input: expected 4 dimensions [N, C, H, W], got size ", to_string(input));
  STD_TORCH_CHECK(weight.size() == 4, "weight: expected 4 dimensions [O, C / groups, kh, kw], got size ",
                  to_string(weight));
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                  "stride: expected two integers of at least 1, got ", to_string(stride));
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0,
                  "dilation: expected two integers of at least 1, got ", to_string(dilation));
  STD_TORCH_CHECK(padding.size() == 4 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "padding: expected four integers of at least 0, got ", to_string(padding));
  STD_TORCH_CHECK(groups > 0, "groups: expected at least 1, got ", groups);
  STD_TORCH_CHECK(weight[0] > 0 && weight[1] > 0 && weight[2] > 0 && weight[3] > 0,
                  "weight: expected no empty dimension, got size ", to_string(weight));
  STD_TORCH_CHECK(weight[0] % groups == 0, "weight: expected output channels divisible by groups = ", groups, ", got ",
                  weight[0]);
  STD_TORCH_CHECK(input[1] == weight[1] * groups, "input: expected ", weight[1] * groups, " channels, got ", input[1]);
  ConvGeometry g;
  g.batch = input[0];
  g.groups = groups;
  g.in_channels = input[1];
  g.in_height = input[2];
  g.in_width = input[3];
  g.out_channels = weight[0];
  g.kernel_height = weight[2];
  g.kernel_width = weight[3];
  g.stride_height = stride[0];
  g.stride_width = stride[1];
  g.dilation_height = dilation[0];
  g.dilation_width = dilation[1];
  g.pad_top = padding[0];
  g.pad_left = padding[2];
  const int64_t spare_height = g.in_height + padding[0] + padding[1] - g.dilation_height * (g.kernel_height - 1) - 1;
  const int64_t spare_width = g.in_width + padding[2] + padding[3] - g.dilation_width * (g.kernel_width - 1) - 1;
  STD_TORCH_CHECK(spare_height >= 0 && spare_width >= 0,
                  "input: expected at least the dilated kernel once padded, got size ", to_string(input));
  g.out_height = spare_height / g.stride_height + 1;
  g.out_width = spare_width / g.stride_width + 1;
  return g;
}

// That `values` go with `other` in dtype and device, and with `mask` as the packed form of `numel` elements; `check` looks at the
// latter, as far as the device allows: check_packed or check_packed_layout.
using PackedCheck = void (*)(const char* name, const Tensor& values, const Tensor& mask, int64_t numel);

inline void check_operand(const char* name, const Tensor& values, const Tensor& mask, int64_t numel,
                          const Tensor& other, PackedCheck check) {
  const std::string values_name = std::string(name) + "_values", mask_name = std::string(name) + "_mask";
  check_same_dtype(values_name.c_str(), values, other);
  check_same_device(values_name.c_str(), values, other);
  check_same_device(mask_name.c_str(), mask, other);
  check(name, values, mask, numel);
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
  return make_geometry({1, weight_size[1], 1, rows}, {weight_size[0], weight_size[1], 1, 1}, {1, 1}, {0, 0, 0, 0},
                       {1, 1}, 1);
}

}  // namespace swat
