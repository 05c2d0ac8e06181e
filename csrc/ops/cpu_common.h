// What the operators on the CPU share: threads, dtypes, memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <optional>

#include "../kernels/cpu/block_cache.h"
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

// Bytes of an element; 0 for the dtypes that no result here has.
inline size_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    default:
      return 0;
  }
}

// Bytes of a dense tensor; nothing where they cannot be counted.
inline std::optional<size_t> bytes_of(const Ints& size, ScalarType dtype) {
  size_t bytes = element_bytes(dtype);
  for (int64_t extent : size) {
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(extent), &bytes)) return std::nullopt;
  }
  return bytes;
}

// A tensor of `size`; a large one lies in a block of the cache, which it returns to.
inline Tensor empty(const Ints& size, ScalarType dtype, bool channels_last = false) {
  cpu::BlockCache* const cache = cpu::BlockCache::shared();
  const std::optional<size_t> bytes = bytes_of(size, dtype);
  if (cache && bytes && *bytes >= cpu::BlockCache::kLeastBytes) {
    void* const block = cache->allocate(*bytes);
    STD_TORCH_CHECK(block != nullptr, "cannot allocate ", *bytes, " bytes for a result of size ", to_string(size));
    return torch::stable::from_blob(block, size, strides_of(size, channels_last),
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                    [](void* data) { cpu::BlockCache::shared()->free(data); });
  }
  return torch::stable::empty(size, dtype, std::nullopt, std::nullopt, std::nullopt, memory_format(channels_last));
}

}  // namespace swat
