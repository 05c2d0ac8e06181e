// The operators of the layers around the convolutions, on the CPU.
#include "../kernels/cpu/batch_norm.h"
#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/max_pool.h"
#include "../kernels/cpu/relu.h"
#include "cpu_common.h"
#include "layers.h"

namespace swat {
namespace {

// See layers.h.
struct CpuLayers {
  template <typename T>
  using Compute = T;

  template <typename F>
  static auto dispatch(const char* name, const Tensor& tensor, F&& f) {
    return swat::dispatch(name, tensor, f);
  }
  static Tensor empty(const Ints& size, ScalarType dtype, const Tensor&, bool channels_last) {
    return swat::empty(size, dtype, channels_last);
  }
  template <typename T>
  static void relu(const Tensor&, const T* input, int64_t numel, T* output, uint64_t* words) {
    cpu::relu<T>(cpu::active(), torch_threads(), input, numel, output, words);
  }
  template <typename T>
  static void relu_backward(const Tensor&, const T* grad_output, const uint64_t* words, int64_t numel, T* grad_input) {
    cpu::relu_backward<T>(cpu::active(), torch_threads(), grad_output, words, numel, grad_input);
  }
  template <typename T>
  static void batch_norm(const Tensor&, const NormArguments<T, T>& arguments) {
    cpu::batch_norm<T>(cpu::active(), torch_threads(), arguments);
  }
  template <typename T>
  static void batch_norm_backward(const Tensor&, const NormGradArguments<T, T>& arguments) {
    cpu::batch_norm_backward<T>(cpu::active(), torch_threads(), arguments);
  }
  template <typename T>
  static void max_pool(const Tensor&, const MaxPoolShape& shape, const T* input, T* output, uint8_t* positions) {
    cpu::max_pool<T>(cpu::active(), torch_threads(), shape, input, output, positions);
  }
  template <typename T>
  static void max_pool_backward(const Tensor&, const MaxPoolShape& shape, const T* grad_output,
                                const uint8_t* positions, T* grad_input) {
    cpu::max_pool_backward<T>(cpu::active(), torch_threads(), shape, grad_output, positions, grad_input);
  }
};

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(CPU, m) { swat::implement_layers<swat::CpuLayers>(m); }
