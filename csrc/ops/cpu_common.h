// What the operators on the CPU share: threads, dtypes, memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../kernels/cpu/pages.h"
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

inline Tensor empty(const Ints& size, ScalarType dtype, bool channels_last = false) {
  Tensor tensor =
      torch::stable::empty(size, dtype, std::nullopt, std::nullopt, std::nullopt, memory_format(channels_last));
  cpu::prefer_large_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

}  // namespace swat
