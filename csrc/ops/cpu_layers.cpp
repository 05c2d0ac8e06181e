// The operators of the layers around the convolutions, on the CPU.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/relu.h"
#include "checks.h"
#include "cpu_common.h"
#include "library.h"

namespace swat {
namespace {

uint64_t* write_words(const Tensor& mask) { return reinterpret_cast<uint64_t*>(mask.mutable_data_ptr<int64_t>()); }

const uint64_t* read_words(const Tensor& mask) {
  return reinterpret_cast<const uint64_t*>(mask.const_data_ptr<int64_t>());
}

// That `mask` has a bit for each of `numel` elements.
void check_bits(const char* name, const Tensor& mask, int64_t numel) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Long && mask.dim() == 1 && mask.is_contiguous(), name,
                  ": expected one contiguous dimension of int64, got size ", to_string(sizes(mask)));
  STD_TORCH_CHECK(mask.size(0) == (numel + 63) / 64, name, ": expected ", (numel + 63) / 64, " words for ", numel,
                  " elements, got ", mask.size(0));
}

// ---- ReLU -------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> relu(const Tensor& input) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const bool last = is_channels_last(input);
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    const int64_t numel = input.numel();
    Tensor output = empty(sizes(input), input.scalar_type(), last);
    Tensor mask = empty({(numel + 63) / 64}, ScalarType::Long);
    cpu::relu<T>(cpu::active(), torch_threads(), source.const_data_ptr<T>(), numel, output.mutable_data_ptr<T>(),
                 write_words(mask));
    return {output, mask};
  });
}

Tensor relu_(Tensor input) {
  return dispatch("input", input, [&]<typename T>() {
    const bool last = is_channels_last(input);
    // The same tensor where it lies densely, else a copy to work on.
    const Tensor dense = torch::stable::contiguous(input, memory_format(last));
    const int64_t numel = input.numel();
    Tensor mask = empty({(numel + 63) / 64}, ScalarType::Long);
    cpu::relu<T>(cpu::active(), torch_threads(), dense.const_data_ptr<T>(), numel, dense.mutable_data_ptr<T>(),
                 write_words(mask));
    if (dense.const_data_ptr<T>() != input.const_data_ptr<T>()) torch::stable::copy_(input, dense);
    return mask;
  });
}

Tensor relu_backward(const Tensor& grad_output, const Tensor& mask, bool channels_last) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    const int64_t numel = grad_output.numel();
    check_bits("mask", mask, numel);
    STD_TORCH_CHECK(!channels_last || grad_output.dim() == 4,
                    "channels_last: expected a grad_output of 4 dimensions, got size ", to_string(sizes(grad_output)));
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(channels_last));
    Tensor grad_input = empty(sizes(grad_output), grad_output.scalar_type(), channels_last);
    cpu::relu_backward<T>(cpu::active(), torch_threads(), grad.const_data_ptr<T>(), read_words(mask), numel,
                          grad_input.mutable_data_ptr<T>());
    return grad_input;
  });
}

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(CPU, m) {
  m.impl("relu", TORCH_BOX(&swat::relu));
  m.impl("relu_", TORCH_BOX(&swat::relu_));
  m.impl("relu_backward", TORCH_BOX(&swat::relu_backward));
}
