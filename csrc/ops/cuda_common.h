// What the operators on CUDA share: device and stream, errors, dtypes, memory from torch's allocator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../kernels/cuda/types.h"
#include "checks.h"
#include "images.h"
#include "layout.h"

// tests/emulator builds the operators with kernels that run on the CPU, to check them where no GPU is at hand.
#ifdef SWAT_EMULATE_CUDA
#define SWAT_CUDA_KEY CPU
#else
#define SWAT_CUDA_KEY CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace swat::cuda_ops {

// The device of a tensor while it lives, and torch's current stream there.
class OnDevice {
 public:
#ifdef SWAT_EMULATE_CUDA
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

inline void check(cudaError_t error, const char* name) {
#ifdef SWAT_EMULATE_CUDA
  STD_TORCH_CHECK(error == cudaSuccess, name, ": CUDA error ", static_cast<int>(error));
#else
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error),
                  " (sizes of 2^31 elements are not supported)");
#endif
}

// Call f<T>() for the tensor's dtype.
template <typename F>
auto dispatch(const char* name, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<cuda::BFloat16>();
    case ScalarType::Half:
      return f.template operator()<cuda::Half>();
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, float64, bfloat16 or float16, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

inline Tensor empty(const Ints& size, ScalarType dtype, const Tensor& like, bool channels_last = false) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, memory_format(channels_last));
}
inline Tensor scratch(size_t bytes, const Tensor& like) {
  return empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, like);
}

}  // namespace swat::cuda_ops
