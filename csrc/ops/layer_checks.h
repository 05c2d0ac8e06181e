// What every device's operators of the layers around the convolutions ask of their arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../kernels/batch_norm.h"
#include "../kernels/max_pool.h"
#include "checks.h"
#include "layout.h"

namespace swat {

// ---- Bit masks --------------------------------------------------------------------------------------------------------------

inline int64_t bit_words(int64_t numel) { return (numel + 63) / 64; }

inline uint64_t* write_words(const Tensor& mask) {
  return reinterpret_cast<uint64_t*>(mask.mutable_data_ptr<int64_t>());
}
inline const uint64_t* read_words(const Tensor& mask) {
  return reinterpret_cast<const uint64_t*>(mask.const_data_ptr<int64_t>());
}

// That `mask` has a bit for each of `numel` elements.
inline void check_bits(const char* name, const Tensor& mask, int64_t numel) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Long && mask.dim() == 1 && mask.is_contiguous(), name,
                  ": expected one contiguous dimension of int64, got size ", to_string(sizes(mask)));
  STD_TORCH_CHECK(mask.size(0) == bit_words(numel), name, ": expected ", bit_words(numel), " words for ", numel,
                  " elements, got ", mask.size(0));
}

// ---- ReLU -------------------------------------------------------------------------------------------------------------------

// That no two elements to be written share memory, as those of an expanded tensor do.
inline void check_writable(const char* name, const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    STD_TORCH_CHECK(tensor.stride(dim) != 0 || tensor.size(dim) < 2 || tensor.numel() == 0, name,
                    ": expected elements that share no memory, got a tensor expanded in dimension ", dim,
                    "; clone() it first");
  }
}

inline void check_relu_backward(const Tensor& grad_output, const Tensor& mask) {
  check_bits("mask", mask, grad_output.numel());
  check_same_device("mask", mask, grad_output);
  STD_TORCH_CHECK(is_dense(grad_output), "grad_output: expected a tensor without gaps, as the output lies in memory");
}

// ---- Batch normalisation ----------------------------------------------------------------------------------------------------

inline Saved saved_form(const char* name, const std::string& form) {
  if (form == "exact") return Saved::exact;
  if (form == "bf16") return Saved::bf16;
  STD_TORCH_CHECK(form == "int8", name, ": expected 'exact', 'bf16' or 'int8', got '", form, "'");
  return Saved::int8;
}

inline ScalarType code_type(Saved saved, ScalarType exact) {
  return saved == Saved::exact ? exact : saved == Saved::bf16 ? ScalarType::BFloat16 : ScalarType::Char;
}

// One number a channel, contiguous; nothing where there is none.
inline std::optional<Tensor> per_channel(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype,
                                         int64_t channels) {
  if (!tensor) return std::nullopt;
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": expected scalar type ", static_cast<int>(dtype), ", got ",
                  static_cast<int>(tensor->scalar_type()));
  check_size(name, sizes(*tensor), {channels});
  return torch::stable::contiguous(*tensor);
}

// What numbers for each channel are kept and computed in.
inline ScalarType wide(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// One number a channel, in the dtype of `like` or, beside a half one, in float32.
inline std::optional<Tensor> weights_of(const char* name, const std::optional<Tensor>& tensor, const Tensor& like,
                                        int64_t channels) {
  if (!tensor) return std::nullopt;
  check_same_device(name, *tensor, like);
  const ScalarType dtype = like.scalar_type();
  return per_channel(name, tensor, tensor->scalar_type() == wide(dtype) ? wide(dtype) : dtype, channels);
}

inline NormShape norm_shape(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 || tensor.dim() == 4, name, ": expected [N, C, H, W] or [N, C], got size ",
                  to_string(sizes(tensor)));
  const int64_t pixels = tensor.dim() == 2 ? 1 : tensor.size(2) * tensor.size(3);
  return {tensor.size(0), tensor.size(1), pixels, !tensor.is_contiguous() && suggests_channels_last(tensor)};
}

inline NormShape check_batch_norm(const Tensor& input, const std::optional<Tensor>& seed) {
  const NormShape shape = norm_shape("input", input);
  STD_TORCH_CHECK(shape.count() > 1, "input: expected more than 1 value per channel, got size ",
                  to_string(sizes(input)));
  if (seed) {
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed: expected one int64 number");
    check_same_device("seed", *seed, input);
  }
  return shape;
}

inline NormShape check_batch_norm_backward(const Tensor& grad_output, const Tensor& saved,
                                           const std::optional<Tensor>& scale, const Tensor& mean, const Tensor& invstd,
                                           const std::string& saved_as, Saved form) {
  const ScalarType type = code_type(form, grad_output.scalar_type());
  STD_TORCH_CHECK(saved.scalar_type() == type, "saved: expected scalar type ", static_cast<int>(type), " for '",
                  saved_as, "', got ", static_cast<int>(saved.scalar_type()));
  check_size("grad_output", sizes(grad_output), sizes(saved));
  STD_TORCH_CHECK(form != Saved::int8 || scale, "scale: expected a tensor for 'int8', got None");
  check_same_device("saved", saved, grad_output);
  check_same_device("mean", mean, grad_output);
  check_same_device("invstd", invstd, grad_output);
  if (scale) check_same_device("scale", *scale, grad_output);
  return norm_shape("saved", saved);
}

// ---- Max pooling ------------------------------------------------------------------------------------------------------------

// torch's rule: with ceil_mode a window may start in the last stride, but not beyond the input and its leading padding.
inline int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t spare = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (spare < 0) return ceil_mode && spare + stride > 0 && size > 0 ? 1 : 0;
  const int64_t count = (spare + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return count - (ceil_mode && (count - 1) * stride >= size + padding);
}

inline void check_pair(const char* name, const Ints& pair, int64_t least) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name,
                  ": expected two integers of at least ", least, ", got ", to_string(pair));
}

inline MaxPoolShape pool_shape(const char* name, const Ints& size, const Ints& kernel_size, const Ints& stride,
                               const Ints& padding, const Ints& dilation, bool ceil_mode, bool channels_last) {
  STD_TORCH_CHECK(size.size() == 4, name, ": expected 4 dimensions [N, C, H, W], got size ", to_string(size));
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  STD_TORCH_CHECK(kernel_size[0] <= kMostTaps && kernel_size[1] <= kMostTaps / kernel_size[0],
                  "kernel_size: expected an area of at most ", kMostTaps, ", got ", to_string(kernel_size));
  STD_TORCH_CHECK(2 * padding[0] <= kernel_size[0] && 2 * padding[1] <= kernel_size[1],
                  "padding: expected at most half of kernel_size ", to_string(kernel_size), ", got ",
                  to_string(padding));
  const MaxPoolShape shape{.batch = size[0],
                           .channels = size[1],
                           .height = size[2],
                           .width = size[3],
                           .out_height = pooled(size[2], kernel_size[0], stride[0], padding[0], dilation[0], ceil_mode),
                           .out_width = pooled(size[3], kernel_size[1], stride[1], padding[1], dilation[1], ceil_mode),
                           .kernel_height = kernel_size[0],
                           .kernel_width = kernel_size[1],
                           .stride_height = stride[0],
                           .stride_width = stride[1],
                           .pad_height = padding[0],
                           .pad_width = padding[1],
                           .dilation_height = dilation[0],
                           .dilation_width = dilation[1],
                           .channels_last = channels_last};
  STD_TORCH_CHECK(shape.out_height > 0 && shape.out_width > 0, name, ": expected at least one whole window, got size ",
                  to_string(size));
  return shape;
}

inline Ints pooled_size(const MaxPoolShape& shape) {
  return {shape.batch, shape.channels, shape.out_height, shape.out_width};
}

// The gradient's tensors beside the `shape` of its pooling.
inline void check_max_pool_backward(const MaxPoolShape& shape, const Tensor& grad_output, const Tensor& positions) {
  check_size("grad_output", sizes(grad_output), pooled_size(shape));
  check_size("positions", sizes(positions), pooled_size(shape));
  check_same_device("positions", positions, grad_output);
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Byte, "positions: expected dtype uint8, got scalar type ",
                  static_cast<int>(positions.scalar_type()));
}

}  // namespace swat
