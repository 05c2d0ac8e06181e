// What the operators on the CPU share: threads, dtypes, memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <optional>

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
