// The two memory formats that results come in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <cstdint>
#include <vector>

namespace swat {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Strides of a dense tensor of either format; 4 dimensions where it is channels_last.
inline std::vector<int64_t> strides_of(const std::vector<int64_t>& size, bool channels_last) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  auto next = [&](size_t dim) {
    strides[dim] = stride;
    stride *= size[dim];
  };
  if (channels_last) {
    for (size_t dim : {1, 3, 2, 0}) next(dim);
  } else {
    for (size_t dim = size.size(); dim-- > 0;) next(dim);
  }
  return strides;
}

// Whether the tensor lies in memory as [N, H, W, C] and not also as [N, C, H, W]: torch's rule, by which sizes of 1 have no stride.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// Whether its elements fill a range of memory, in either of the two formats.
inline bool is_dense(const Tensor& tensor) { return tensor.is_contiguous() || is_channels_last(tensor); }

}  // namespace swat
