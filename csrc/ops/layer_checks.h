// What every device's operators of the layers around the convolutions ask of their arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../kernels/cpu/layer_params.h"
#include "checks.h"

namespace swat {

// That `mask` has a bit for each of `numel` elements.
inline void check_bits(const char* name, const Tensor& mask, int64_t numel) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Long && mask.dim() == 1 && mask.is_contiguous(), name,
                  ": expected one contiguous dimension of int64, got size ", to_string(sizes(mask)));
  STD_TORCH_CHECK(mask.size(0) == (numel + 63) / 64, name, ": expected ", (numel + 63) / 64, " words for ", numel,
                  " elements, got ", mask.size(0));
}

inline cpu::Saved saved_form(const char* name, const std::string& form) {
  if (form == "exact") return cpu::Saved::exact;
  if (form == "bf16") return cpu::Saved::bf16;
  STD_TORCH_CHECK(form == "int8", name, ": expected 'exact', 'bf16' or 'int8', got '", form, "'");
  return cpu::Saved::int8;
}

inline ScalarType code_type(cpu::Saved saved, ScalarType exact) {
  return saved == cpu::Saved::exact ? exact : saved == cpu::Saved::bf16 ? ScalarType::BFloat16 : ScalarType::Char;
}

// One number a channel, contiguous; nothing where there is none.
inline std::optional<Tensor> per_channel(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype,
                                         int64_t channels) {
  if (!tensor) return std::nullopt;
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": expected scalar type ", static_cast<int>(dtype), ", got ",
                  static_cast<int>(tensor->scalar_type()));
  check_size(name, sizes(*tensor), {channels});
  return torch::stable::contiguous(*tensor);
}

// torch's rule: with ceil_mode a window may start in the last stride, but not beyond the input and its leading padding.
inline int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t spare = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (spare < 0) return ceil_mode && spare + stride > 0 && size > 0 ? 1 : 0;
  const int64_t count = (spare + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return count - (ceil_mode && (count - 1) * stride >= size + padding);
}

inline void check_pair(const char* name, const Ints& pair, int64_t least) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name,
                  ": expected two integers of at least ", least, ", got ", to_string(pair));
}

inline cpu::MaxPoolShape pool_shape(const char* name, const Ints& size, const Ints& kernel_size, const Ints& stride,
                                    const Ints& padding, const Ints& dilation, bool ceil_mode, bool channels_last) {
  STD_TORCH_CHECK(size.size() == 4, name, ": expected 4 dimensions [N, C, H, W], got size ", to_string(size));
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  STD_TORCH_CHECK(kernel_size[0] <= cpu::kMostTaps && kernel_size[1] <= cpu::kMostTaps / kernel_size[0],
                  "kernel_size: expected an area of at most ", cpu::kMostTaps, ", got ", to_string(kernel_size));
  STD_TORCH_CHECK(2 * padding[0] <= kernel_size[0] && 2 * padding[1] <= kernel_size[1],
                  "padding: expected at most half of kernel_size ", to_string(kernel_size), ", got ",
                  to_string(padding));
  const cpu::MaxPoolShape shape{
      .batch = size[0],
      .channels = size[1],
      .height = size[2],
      .width = size[3],
      .out_height = pooled(size[2], kernel_size[0], stride[0], padding[0], dilation[0], ceil_mode),
      .out_width = pooled(size[3], kernel_size[1], stride[1], padding[1], dilation[1], ceil_mode),
      .kernel_height = kernel_size[0],
      .kernel_width = kernel_size[1],
      .stride_height = stride[0],
      .stride_width = stride[1],
      .pad_height = padding[0],
      .pad_width = padding[1],
      .dilation_height = dilation[0],
      .dilation_width = dilation[1],
      .channels_last = channels_last};
  STD_TORCH_CHECK(shape.out_height > 0 && shape.out_width > 0, name, ": expected at least one whole window, got size ",
                  to_string(size));
  return shape;
}

}  // namespace swat
