// The two memory formats that results come in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace swat {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Whether the tensor fills memory as [N, H, W, C] and not also as [N, C, H, W]. Sizes of 1 have no stride.
inline bool is_channels_last_contiguous(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// torch's rule of the memory format that results take from the tensor: channels_last where its strides are in that order, with gaps or
// without. One that is contiguous too, with one channel say, may be either.
inline bool suggests_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t dim : {1, 3, 2, 0}) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 0 || stride < least || (dim == 0 && least == tensor.stride(1))) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

// Whether its elements fill a range of memory, whatever the order of its dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1) axes.emplace_back(tensor.stride(dim), tensor.size(dim));
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace swat
