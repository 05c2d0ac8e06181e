// The operators of the layers around the convolutions, on CUDA. As in cuda.cpp, nothing here waits for the device.
#include "../kernels/cuda/layers.h"
#include "cuda_common.h"
#include "layers.h"

namespace swat {
namespace {

using namespace cuda_ops;

// See layers.h.
struct CudaLayers {
  template <typename T>
  using Compute = cuda::Compute<T>;

  template <typename F>
  static auto dispatch(const char* name, const Tensor& tensor, F&& f) {
    return cuda_ops::dispatch(name, tensor, f);
  }
  static Tensor empty(const Ints& size, ScalarType dtype, const Tensor& like, bool channels_last) {
    return cuda_ops::empty(size, dtype, like, channels_last);
  }
  template <typename T>
  static void relu(const Tensor& like, const T* input, int64_t numel, T* output, uint64_t* words) {
    const OnDevice device(like);
    check(cuda::relu<T>(input, numel, output, words, device.stream()), "relu");
  }
  template <typename T>
  static void relu_backward(const Tensor& like, const T* grad_output, const uint64_t* words, int64_t numel,
                            T* grad_input) {
    const OnDevice device(like);
    check(cuda::relu_backward<T>(grad_output, words, numel, grad_input, device.stream()), "relu_backward");
  }
  template <typename T>
  static void batch_norm(const Tensor& like, const NormArguments<T, Compute<T>>& arguments) {
    const OnDevice device(like);
    const Tensor memory = scratch(cuda::batch_norm_scratch<T>(arguments.shape), like);
    check(cuda::batch_norm<T>({arguments, write<void>(memory)}, device.stream()), "batch_norm");
  }
  template <typename T>
  static void batch_norm_backward(const Tensor& like, const NormGradArguments<T, Compute<T>>& arguments) {
    const OnDevice device(like);
    const Tensor memory = scratch(cuda::batch_norm_backward_scratch<T>(arguments.shape), like);
    check(cuda::batch_norm_backward<T>({arguments, write<void>(memory)}, device.stream()), "batch_norm_backward");
  }
  template <typename T>
  static void max_pool(const Tensor& like, const MaxPoolShape& shape, const T* input, T* output, uint8_t* positions) {
    const OnDevice device(like);
    check(cuda::max_pool<T>(shape, input, output, positions, device.stream()), "max_pool2d");
  }
  template <typename T>
  static void max_pool_backward(const Tensor& like, const MaxPoolShape& shape, const T* grad_output,
                                const uint8_t* positions, T* grad_input) {
    const OnDevice device(like);
    check(cuda::max_pool_backward<T>(shape, grad_output, positions, grad_input, device.stream()),
          "max_pool2d_backward");
  }
};

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(SWAT_CUDA_KEY, m) { swat::implement_layers<swat::CudaLayers>(m); }
