// The operators of the layers around the convolutions, on the CPU.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "../kernels/cpu/batch_norm.h"
#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/max_pool.h"
#include "../kernels/cpu/relu.h"
#include "cpu_common.h"
#include "layer_checks.h"
#include "library.h"

namespace swat {
namespace {

uint64_t* write_words(const Tensor& mask) { return reinterpret_cast<uint64_t*>(mask.mutable_data_ptr<int64_t>()); }

const uint64_t* read_words(const Tensor& mask) {
  return reinterpret_cast<const uint64_t*>(mask.const_data_ptr<int64_t>());
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

// ---- Batch normalisation ----------------------------------------------------------------------------------------------------

cpu::BatchNormShape norm_shape(const char* name, const Tensor& tensor, bool channels_last) {
  STD_TORCH_CHECK(tensor.dim() == 2 || tensor.dim() == 4, name, ": expected [N, C, H, W] or [N, C], got size ",
                  to_string(sizes(tensor)));
  const int64_t pixels = tensor.dim() == 2 ? 1 : tensor.size(2) * tensor.size(3);
  return cpu::batch_norm_shape(tensor.size(0), tensor.size(1), pixels, channels_last);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->template const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    const std::string& saved, const std::optional<Tensor>& seed, bool relu) {
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  return dispatch("input", input, [&]<typename T>() -> Result {
    const bool last = is_channels_last(input);
    const cpu::BatchNormShape shape = norm_shape("input", input, last);
    STD_TORCH_CHECK(shape.count() > 1, "input: expected more than 1 value per channel, got size ",
                    to_string(sizes(input)));
    const cpu::Saved form = saved_form("saved", saved);
    const ScalarType dtype = input.scalar_type();
    const std::optional<Tensor> weights = per_channel("weight", weight, dtype, shape.channels);
    const std::optional<Tensor> biases = per_channel("bias", bias, dtype, shape.channels);
    STD_TORCH_CHECK(!seed || (seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                    "seed: expected one int64 number");
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    const Ints size = sizes(input);
    Tensor output = empty(size, dtype, last);
    Tensor mean = empty({shape.channels}, ScalarType::Double);
    Tensor invstd = empty({shape.channels}, ScalarType::Double);
    Tensor variance = empty({shape.channels}, ScalarType::Double);
    const bool exact = form == cpu::Saved::exact;
    Tensor codes = empty(exact ? Ints{0} : size, code_type(form, dtype), last && !exact);
    Tensor scale = empty({form == cpu::Saved::int8 ? shape.channels : 0}, dtype);
    Tensor mask = empty({relu ? (shape.numel() + 63) / 64 : 0}, ScalarType::Long);
    cpu::batch_norm<T>(cpu::active(), torch_threads(), shape, source.const_data_ptr<T>(), data_or_null<T>(weights),
                       data_or_null<T>(biases), eps, form, seed ? *seed->const_data_ptr<int64_t>() : 0,
                       {.output = output.mutable_data_ptr<T>(),
                        .mean = mean.mutable_data_ptr<double>(),
                        .invstd = invstd.mutable_data_ptr<double>(),
                        .variance = variance.mutable_data_ptr<double>(),
                        .codes = exact ? nullptr : codes.mutable_data_ptr(),
                        .scale = scale.mutable_data_ptr<T>(),
                        .words = relu ? write_words(mask) : nullptr});
    return {output, mean, invstd, variance, codes, scale, mask};
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& saved,
                                                       const std::optional<Tensor>& scale, const Tensor& mean,
                                                       const Tensor& invstd, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& relu_mask,
                                                       const std::string& saved_as, const std::optional<Tensor>& bias,
                                                       bool relu) {
  return dispatch("grad_output", grad_output, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor> {
    const ScalarType dtype = grad_output.scalar_type();
    const cpu::Saved form = saved_form("saved_as", saved_as);
    STD_TORCH_CHECK(saved.scalar_type() == code_type(form, dtype), "saved: expected scalar type ",
                    static_cast<int>(code_type(form, dtype)), " for '", saved_as, "', got ",
                    static_cast<int>(saved.scalar_type()));
    check_size("grad_output", sizes(grad_output), sizes(saved));
    const bool last = is_channels_last(saved);
    const cpu::BatchNormShape shape = norm_shape("saved", saved, last);
    STD_TORCH_CHECK(form != cpu::Saved::int8 || scale, "scale: expected a tensor for 'int8', got None");
    const std::optional<Tensor> scales = per_channel("scale", scale, dtype, shape.channels);
    const std::optional<Tensor> weights = per_channel("weight", weight, dtype, shape.channels);
    const Tensor means = *per_channel("mean", mean, ScalarType::Double, shape.channels);
    const Tensor invstds = *per_channel("invstd", invstd, ScalarType::Double, shape.channels);
    const std::optional<Tensor> biases = per_channel("bias", bias, dtype, shape.channels);
    if (relu_mask) check_bits("relu_mask", *relu_mask, shape.numel());
    STD_TORCH_CHECK(!relu || relu_mask || form == cpu::Saved::exact, "relu_mask: expected a tensor for '", saved_as,
                    "' with relu, got None");
    const Tensor values = torch::stable::contiguous(saved, memory_format(last));
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(last));
    Tensor grad_input = empty(sizes(saved), dtype, last);
    Tensor grad_weight = empty({shape.channels}, dtype);
    Tensor grad_bias = empty({shape.channels}, dtype);
    cpu::batch_norm_backward<T>(cpu::active(), torch_threads(), shape, grad.const_data_ptr<T>(),
                                {.form = form,
                                 .values = values.const_data_ptr(),
                                 .scale = data_or_null<T>(scales),
                                 .mean = means.const_data_ptr<double>(),
                                 .invstd = invstds.const_data_ptr<double>(),
                                 .weight = data_or_null<T>(weights),
                                 .bias = data_or_null<T>(biases),
                                 .mask = relu_mask ? read_words(*relu_mask) : nullptr,
                                 .rectified = relu && !relu_mask},
                                grad_input.mutable_data_ptr<T>(), grad_weight.mutable_data_ptr<T>(),
                                grad_bias.mutable_data_ptr<T>());
    return {grad_input, grad_weight, grad_bias};
  });
}

// ---- Max pooling ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, const Ints& kernel_size, const Ints& stride,
                                      const Ints& padding, const Ints& dilation, bool ceil_mode) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const bool last = is_channels_last(input);
    const auto shape = pool_shape("input", sizes(input), kernel_size, stride, padding, dilation, ceil_mode, last);
    const Ints size{shape.batch, shape.channels, shape.out_height, shape.out_width};
    const Tensor source = torch::stable::contiguous(input, memory_format(last));
    Tensor output = empty(size, input.scalar_type(), last);
    Tensor positions = empty(size, ScalarType::Byte, last);
    cpu::max_pool<T>(cpu::active(), torch_threads(), shape, source.const_data_ptr<T>(), output.mutable_data_ptr<T>(),
                     positions.mutable_data_ptr<uint8_t>());
    return {output, positions};
  });
}

Tensor max_pool2d_backward(const Tensor& grad_output, const Tensor& positions, const Ints& input_size,
                           const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                           bool ceil_mode) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    const bool last = is_channels_last(positions);
    const auto shape = pool_shape("input_size", input_size, kernel_size, stride, padding, dilation, ceil_mode, last);
    const Ints size{shape.batch, shape.channels, shape.out_height, shape.out_width};
    check_size("grad_output", sizes(grad_output), size);
    check_size("positions", sizes(positions), size);
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Byte, "positions: expected dtype uint8, got scalar type ",
                    static_cast<int>(positions.scalar_type()));
    const Tensor where = torch::stable::contiguous(positions, memory_format(last));
    const Tensor grad = torch::stable::contiguous(grad_output, memory_format(last));
    Tensor grad_input = empty(input_size, grad_output.scalar_type(), last);
    cpu::max_pool_backward<T>(cpu::active(), torch_threads(), shape, grad.const_data_ptr<T>(),
                              where.const_data_ptr<uint8_t>(), grad_input.mutable_data_ptr<T>());
    return grad_input;
  });
}

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(CPU, m) {
  m.impl("relu", TORCH_BOX(&swat::relu));
  m.impl("relu_", TORCH_BOX(&swat::relu_));
  m.impl("relu_backward", TORCH_BOX(&swat::relu_backward));
  m.impl("batch_norm", TORCH_BOX(&swat::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&swat::batch_norm_backward));
  m.impl("max_pool2d", TORCH_BOX(&swat::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&swat::max_pool2d_backward));
}
