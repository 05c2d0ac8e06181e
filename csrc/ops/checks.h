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

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& reference) {
  STD_TORCH_CHECK(tensor.device() == reference.device(), name,
                  ": expected the device of the other arguments, got another");
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

}  // namespace swat
