// Checks that every device's operators share. The Python layer checks what users pass; these keep a direct call of torch.ops from
// reading memory that is not there. Messages name the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "../kernels/cpu/params.h"

namespace swat {

using Ints = std::vector<int64_t>;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string to_string(const Ints& values) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

inline Ints sizes(const Tensor& tensor) {
  Ints found(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) found[i] = tensor.size(i);
  return found;
}

inline int64_t product(const Ints& size) {
  int64_t count = 1;
  for (int64_t extent : size) count *= extent;
  return count;
}

inline void check_dtype(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, name,
                  ": expected dtype float32 or float64, got scalar type ", static_cast<int>(tensor.scalar_type()));
}

inline void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& reference) {
  STD_TORCH_CHECK(tensor.scalar_type() == reference.scalar_type(), name, ": expected scalar type ",
                  static_cast<int>(reference.scalar_type()), ", got ", static_cast<int>(tensor.scalar_type()));
}

inline void check_size(const char* name, const Ints& size, const Ints& expected) {
  STD_TORCH_CHECK(size == expected, name, ": expected size ", to_string(expected), ", got ", to_string(size));
}

inline int64_t mask_words(int64_t numel) { return (numel + 63) / 64 + (numel + cpu::kBlockBits - 1) / cpu::kBlockBits; }

// That (values, mask) are laid out as the packed form of `numel` elements; their contents are not looked at.
inline void check_packed_layout(const char* name, const Tensor& values, const Tensor& mask, int64_t numel) {
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), name,
                  "_values: expected one contiguous dimension, got size ", to_string(sizes(values)));
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Long && mask.dim() == 1 && mask.is_contiguous(), name,
                  "_mask: expected one contiguous dimension of int64, got size ", to_string(sizes(mask)));
  STD_TORCH_CHECK(mask.size(0) == mask_words(numel), name, "_mask: expected ", mask_words(numel), " words for ", numel,
                  " elements, got ", mask.size(0));
}

// The same for tensors on the CPU, where the last block says how many values there must be; the blocks before it are trusted.
inline void check_packed(const char* name, const Tensor& values, const Tensor& mask, int64_t numel) {
  check_packed_layout(name, values, mask, numel);
  const int64_t* words = mask.const_data_ptr<int64_t>();
  int64_t kept = numel == 0 ? 0 : words[mask.size(0) - 1];
  for (int64_t i = (numel - 1) / cpu::kBlockBits * (cpu::kBlockBits / 64); i < (numel + 63) / 64; ++i) {
    kept += std::popcount(static_cast<uint64_t>(words[i]));
  }
  STD_TORCH_CHECK(values.size(0) == kept, name, "_values: expected ", kept, " elements, as the mask counts, got ",
                  values.size(0));
}

// That `keep` and `capacity` come together and can be met.
inline void check_capacity(int64_t numel, const std::optional<int64_t>& keep, const std::optional<int64_t>& capacity) {
  STD_TORCH_CHECK(keep.has_value() == capacity.has_value(), "capacity: expected both keep and capacity, or neither");
  if (!capacity) return;
  STD_TORCH_CHECK(*keep >= (numel > 0 ? 1 : 0) && *keep <= *capacity && *capacity <= numel,
                  "capacity: expected 1 <= keep <= capacity <= input.numel() = ", numel, ", got keep ", *keep,
                  ", capacity ", *capacity);
}

// The geometry of a convolution of `input` size [N, C, H, W] with `weight` size [O, C / groups, kh, kw].
inline cpu::ConvGeometry make_geometry(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
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
  cpu::ConvGeometry g;
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

}  // namespace swat
