// Checks that every device's operators share. The Python layer checks what users pass; these keep a direct call of torch.ops from
// reading memory that is not there. Messages name the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
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

// Elements of a tensor: so few that their bytes, and a few times those, can be counted.
inline constexpr int64_t kMostElements = int64_t{1} << 56;

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

// That `size` is one that a tensor can have, and that so many elements can be counted.
inline void check_extents(const char* name, const Ints& size) {
  int64_t count = 1;
  for (int64_t extent : size) {
    STD_TORCH_CHECK(extent >= 0, name, ": expected no extent below 0, got ", to_string(size));
    STD_TORCH_CHECK(!__builtin_mul_overflow(count, std::max<int64_t>(extent, 1), &count) && count <= kMostElements,
                    name, ": expected at most 2^", std::bit_width(static_cast<uint64_t>(kMostElements)) - 1,
                    " elements, got size ", to_string(size));
  }
}

inline void check_dtype(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, name,
                  ": expected dtype float32, float64, bfloat16 or float16, got scalar type ",
                  static_cast<int>(tensor.scalar_type()));
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

// That a mask is laid out as that of `numel` elements, on the device of `other`; its contents are not looked at.
inline void check_mask_layout(const std::string& name, const Tensor& mask, int64_t numel, const Tensor& other) {
  check_same_device(name.c_str(), mask, other);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Long && mask.dim() == 1 && mask.is_contiguous(), name,
                  ": expected one contiguous dimension of int64, got size ", to_string(sizes(mask)));
  STD_TORCH_CHECK(mask.size(0) == mask_words(numel), name, ": expected ", mask_words(numel), " words for ", numel,
                  " elements, got ", mask.size(0));
}

// The same of a packed tensor, whose values have the dtype of `other` too. `name` is "weight_" or "input_", or nothing.
inline void check_packed_layout(const std::string& name, const Tensor& values, const Tensor& mask, int64_t numel,
                                const Tensor& other) {
  const std::string values_name = name + "values";
  check_same_dtype(values_name.c_str(), values, other);
  check_same_device(values_name.c_str(), values, other);
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), values_name,
                  ": expected one contiguous dimension, got size ", to_string(sizes(values)));
  check_mask_layout(name + "mask", mask, numel, other);
}

inline void check_k(const Tensor& input, int64_t k) {
  STD_TORCH_CHECK(k >= 1 && k <= input.numel(), "k: expected from 1 to input.numel() = ", input.numel(), ", got ", k);
}

// An index of a dimension, from the end if below 0.
inline void check_dim(const Tensor& tensor, int64_t& dim) {
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(dim >= -dims && dim < dims, "dim: expected from ", -dims, " to ", dims - 1, ", got ", dim);
  if (dim < 0) dim += dims;
}

// How many elements a selection of `keep` may hold, before it is made anew for the call. swat_ext/ops/library.py says the same.
struct KeptBounds {
  int64_t least, most;

  KeptBounds(int64_t keep, int64_t numel) : KeptBounds(keep, numel, std::min<int64_t>(64, (numel + 63) / 64)) {}

 private:
  KeptBounds(int64_t keep, int64_t numel, int64_t slack)
      : least(std::max<int64_t>(0, std::min(keep - keep / 5, keep - slack))),
        most(keep > numel - std::max(keep / 4, slack) ? numel : keep + std::max(keep / 4, slack)) {}
};

// The arguments of compress, for the bounds of its result if it has a budget.
inline std::optional<KeptBounds> check_compress(const Tensor& input, const Tensor& threshold,
                                                const std::optional<int64_t>& keep,
                                                const std::optional<int64_t>& room) {
  STD_TORCH_CHECK(threshold.numel() == 1, "threshold: expected one number, got size ", to_string(sizes(threshold)));
  check_same_dtype("threshold", threshold, input);
  check_same_device("threshold", threshold, input);
  const int64_t numel = input.numel();
  if (room) {
    STD_TORCH_CHECK(*room >= 0 && *room <= numel, "room: expected from 0 to input.numel() = ", numel, ", got ", *room);
  }
  if (!keep) return std::nullopt;
  STD_TORCH_CHECK(*keep >= (numel > 0 ? 1 : 0) && *keep <= numel, "keep: expected from 1 to input.numel() = ", numel,
                  ", got ", *keep);
  return KeptBounds(*keep, numel);
}

}  // namespace swat
