// What the operators on the CPU share: threads, dtypes, memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <optional>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/packing.h"
#include "../kernels/cpu/parallel.h"
#include "checks.h"
#include "layout.h"

namespace swat {

// torch's own threads, so that torch.set_num_threads holds.
inline cpu::Parallel torch_threads() {
  return {[](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
            torch::stable::parallel_for(0, count, grain, body);
          },
          static_cast<int64_t>(torch::stable::get_num_threads())};
}

// Call f<T>() for the tensor's dtype.
template <typename F>
auto dispatch(const char* name, const Tensor& tensor, F&& f) {
  check_dtype(name, tensor);
  return tensor.scalar_type() == ScalarType::Float ? f.template operator()<float>() : f.template operator()<double>();
}

// The elements that a mask on the CPU keeps, once its bits and ranks are found to agree: a kernel that trusted them could leave the
// tensors. One pass over the mask, a thirty-second of the dense bytes, at each call, whoever made it.
inline int64_t check_mask(const std::string& name, const Tensor& mask, int64_t numel, const Tensor& other) {
  check_mask_layout(name, mask, numel, other);
  const int64_t* const words = mask.const_data_ptr<int64_t>();
  const std::optional<int64_t> kept = cpu::count_kept(
      cpu::active(), torch_threads(), reinterpret_cast<const uint64_t*>(words), words + (numel + 63) / 64, numel);
  STD_TORCH_CHECK(kept.has_value(), name, ": expected counts that agree with its bits, and no bits past ", numel,
                  " elements");
  return *kept;
}

inline void check_packed(const std::string& name, const Tensor& values, const Tensor& mask, int64_t numel,
                         const Tensor& other) {
  check_packed_layout(name, values, mask, numel, other);
  const int64_t kept = check_mask(name + "mask", mask, numel, other);
  STD_TORCH_CHECK(values.size(0) >= kept, name, "values: expected at least ", kept,
                  " elements, as the mask counts, got ", values.size(0));
}

// A tensor of `size`. What a size asks for may be absurd, of a large padding say, but never wraps. torch's own message would be lost
// on the way through the stable interface.
inline Tensor empty(const Ints& size, ScalarType dtype, bool channels_last = false) {
  bool fits = true;
  int64_t bytes = sizeof(double);
  for (int64_t extent : size) fits = fits && !__builtin_mul_overflow(bytes, extent, &bytes);
  if (fits) {
    try {
      return torch::stable::empty(size, dtype, std::nullopt, std::nullopt, std::nullopt, memory_format(channels_last));
    } catch (const std::exception&) {
    }
  }
  STD_TORCH_CHECK(false, "cannot allocate memory for a result of size ", to_string(size));
}

}  // namespace swat
