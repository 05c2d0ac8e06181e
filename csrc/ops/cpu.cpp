// The operators on the CPU: from torch's tensors to the kernels' pointers and back.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>

#include "../kernels/cpu/convolution.h"
#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/packing.h"
#include "convolution_checks.h"
#include "cpu_common.h"
#include "library.h"

namespace swat {
namespace {

template <typename T, typename Data>
ImageView<T> image(const Tensor& tensor, Data* data) {
  return {.data = data,
          .batch = tensor.size(0),
          .channels = tensor.size(1),
          .height = tensor.size(2),
          .width = tensor.size(3),
          .batch_stride = tensor.stride(0),
          .channel_stride = tensor.stride(1),
          .row_stride = tensor.stride(2),
          .column_stride = tensor.stride(3)};
}
template <typename T>
ImageView<const T> read_image(const Tensor& tensor) {
  return image<const T>(tensor, tensor.const_data_ptr<T>());
}
template <typename T>
ImageView<T> write_image(const Tensor& tensor) {
  return image<T>(tensor, tensor.mutable_data_ptr<T>());
}

template <typename T>
cpu::PackedView<T> packed(const Tensor& values, const Tensor& mask, int64_t numel) {
  const int64_t* words = mask.const_data_ptr<int64_t>();
  return {.values = values.const_data_ptr<T>(),
          .words = reinterpret_cast<const uint64_t*>(words),
          .ranks = words + (numel + 63) / 64,
          .numel = numel};
}

// A contiguous tensor is cut in runs that end on whole words of the bitmap, so that threads never meet in one.
constexpr int64_t kRunElements = 4096;

// The tensor as planes that the packing kernels take as they lie, or nothing if it has to be copied first.
template <typename T, typename Data>
std::optional<cpu::PlanesView<T>> planes(const Tensor& tensor, Data* data) {
  const int64_t numel = tensor.numel();
  if (tensor.is_contiguous()) {
    return cpu::PlanesView<T>{.data = data,
                              .channels = 1,
                              .pixels = kRunElements,
                              .numel = numel,
                              .outer_stride = kRunElements,
                              .channel_stride = 0,
                              .pixel_stride = 1};
  }
  if (tensor.dim() != 4) return std::nullopt;
  cpu::PlanesView<T> view{.data = data,
                          .channels = tensor.size(1),
                          .pixels = tensor.size(2) * tensor.size(3),
                          .numel = numel,
                          .outer_stride = tensor.stride(0),
                          .channel_stride = tensor.stride(1),
                          .pixel_stride = tensor.size(3) == 1 ? tensor.stride(2) : tensor.stride(3)};
  const bool joined =
      tensor.size(2) == 1 || tensor.size(3) == 1 || tensor.stride(2) == tensor.size(3) * tensor.stride(3);
  if (!joined || (view.pixel_stride != 1 && view.channel_stride != 1)) return std::nullopt;
  return view;
}

Tensor kth_magnitude(const Tensor& input, int64_t k) {
  return dispatch("input", input, [&]<typename T>() {
    STD_TORCH_CHECK(k >= 1 && k <= input.numel(), "k: expected from 1 to input.numel() = ", input.numel(), ", got ", k);
    // Order does not matter: what is dense in memory is read as it lies.
    const bool dense = input.dim() == 4 && input.stride(1) == 1 && input.stride(3) == input.size(1) &&
                       input.stride(2) == input.size(3) * input.stride(3) &&
                       input.stride(0) == input.size(2) * input.stride(2);
    const Tensor source = dense ? input : torch::stable::contiguous(input);
    Tensor result = empty({}, input.scalar_type());
    *result.mutable_data_ptr<T>() =
        cpu::kth_magnitude<T>(cpu::active(), torch_threads(), source.const_data_ptr<T>(), input.numel(), k);
    return result;
  });
}

// (values, mask) of `source`, whose strides planes() takes. With a `capacity`, values are that long; see compress.
template <typename T>
std::tuple<Tensor, Tensor, int64_t> compress_planes(const Tensor& source, T threshold,
                                                    std::optional<int64_t> capacity) {
  const int64_t numel = source.numel();
  Tensor mask = empty({mask_words(numel)}, ScalarType::Long);
  int64_t* const words = mask.mutable_data_ptr<int64_t>();
  std::optional<Tensor> values;
  int64_t count = 0;
  cpu::compress<T>(cpu::active(), torch_threads(), *planes<const T>(source, source.const_data_ptr<T>()), threshold,
                   reinterpret_cast<uint64_t*>(words), words + (numel + 63) / 64, [&](int64_t kept) {
                     count = kept;
                     values = empty({std::max(kept, capacity.value_or(0))}, source.scalar_type());
                     return values->template mutable_data_ptr<T>();
                   });
  return {*values, mask, count};
}

// Drop what is kept past `capacity` elements, in logical order.
void trim(uint64_t* words, int64_t* ranks, int64_t numel, int64_t capacity) {
  int64_t rank = 0;
  for (int64_t i = 0; i < (numel + 63) / 64; ++i) {
    if (i % (cpu::kBlockBits / 64) == 0) ranks[i / (cpu::kBlockBits / 64)] = rank;
    while (rank + std::popcount(words[i]) > capacity) words[i] ^= std::bit_floor(words[i]);
    rank += std::popcount(words[i]);
  }
}

std::tuple<Tensor, Tensor> compress(const Tensor& input, const Tensor& threshold, std::optional<int64_t> keep,
                                    std::optional<int64_t> capacity) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    STD_TORCH_CHECK(threshold.numel() == 1, "threshold: expected one number, got size ", to_string(sizes(threshold)));
    check_same_dtype("threshold", threshold, input);
    check_capacity(input.numel(), keep, capacity);
    const bool as_it_lies = planes<const T>(input, input.const_data_ptr<T>()).has_value();
    const Tensor source = as_it_lies ? input : torch::stable::contiguous(input);
    std::tuple<Tensor, Tensor, int64_t> found = compress_planes<T>(source, *threshold.const_data_ptr<T>(), capacity);
    if (capacity && std::get<2>(found) > *capacity) {
      const Tensor fresh = kth_magnitude(input, *keep);
      found = compress_planes<T>(source, *fresh.const_data_ptr<T>(), capacity);
    }
    Tensor values = std::get<0>(found);
    const Tensor mask = std::get<1>(found);
    const int64_t count = std::get<2>(found);
    if (!capacity) return {values, mask};
    if (count > *capacity) {
      int64_t* const words = mask.mutable_data_ptr<int64_t>();
      trim(reinterpret_cast<uint64_t*>(words), words + (input.numel() + 63) / 64, input.numel(), *capacity);
      values = torch::stable::clone(torch::stable::narrow(values, 0, 0, *capacity));
    } else {
      std::fill(values.mutable_data_ptr<T>() + count, values.mutable_data_ptr<T>() + *capacity, T{0});
    }
    return {values, mask};
  });
}

Tensor take(const Tensor& input, const Tensor& mask, int64_t count) {
  return dispatch("input", input, [&]<typename T>() {
    STD_TORCH_CHECK(count >= 0, "count: expected at least 0, got ", count);
    Tensor values = empty({count}, input.scalar_type());
    check_packed("input", values, mask, input.numel());
    const bool as_it_lies = planes<const T>(input, input.const_data_ptr<T>()).has_value();
    const Tensor source = as_it_lies ? input : torch::stable::contiguous(input);
    if (count > 0) {
      cpu::take<T>(cpu::active(), torch_threads(), packed<T>(values, mask, input.numel()),
                   *planes<const T>(source, source.const_data_ptr<T>()), values.mutable_data_ptr<T>());
    }
    return values;
  });
}

// Elements [begin, end) of the first dimension of a packed tensor; of one without dimensions, its element.
Tensor unpack(const Tensor& values, const Tensor& mask, const Ints& size, int64_t begin, int64_t end,
              bool channels_last) {
  return dispatch("values", values, [&]<typename T>() {
    const int64_t numel = product(size);
    check_packed("packed", values, mask, numel);
    STD_TORCH_CHECK(!channels_last || size.size() == 4, "channels_last: expected a size of 4 dimensions, got ",
                    to_string(size));
    Ints part = size;
    if (!part.empty()) part[0] = end - begin;
    Tensor output = empty(part, values.scalar_type(), channels_last);
    if (output.numel() > 0) {
      cpu::PlanesView<T> view = *planes<T>(output, output.mutable_data_ptr<T>());
      view.first = begin == 0 ? 0 : numel / size[0] * begin;
      cpu::decompress<T>(cpu::active(), torch_threads(), packed<T>(values, mask, numel), view);
    }
    return output;
  });
}

Tensor decompress(const Tensor& values, const Tensor& mask, const Ints& size, bool channels_last) {
  return unpack(values, mask, size, 0, size.empty() ? 1 : size[0], channels_last);
}

Tensor decompress_part(const Tensor& values, const Tensor& mask, const Ints& size, int64_t begin, int64_t end,
                       bool channels_last) {
  STD_TORCH_CHECK(!size.empty() && 0 <= begin && begin <= end && end <= size[0],
                  "begin: expected 0 <= begin <= end <= size[0], got ", begin, " to ", end, " of size ",
                  to_string(size));
  return unpack(values, mask, size, begin, end, channels_last);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& weight_values,
              const Tensor& weight_mask, const std::optional<Tensor>& /*input_values*/,
              const std::optional<Tensor>& /*input_mask*/, const Ints& stride, const Ints& padding,
              const Ints& dilation, int64_t groups, bool channels_last, bool /*retake_weight*/) {
  return dispatch("input", input, [&]<typename T>() {
    const ConvGeometry g =
        check_conv2d(input, weight, bias, weight_values, weight_mask, stride, padding, dilation, groups, check_packed);
    std::optional<Tensor> offsets;
    if (bias) offsets = torch::stable::contiguous(*bias);
    Tensor output = empty({g.batch, g.out_channels, g.out_height, g.out_width}, input.scalar_type(), channels_last);
    cpu::convolution<T>(cpu::active(), torch_threads(), g, read_image<T>(input),
                        packed<T>(weight_values, weight_mask, weight.numel()),
                        offsets ? offsets->template const_data_ptr<T>() : nullptr, write_image<T>(output));
    return output;
  });
}

Tensor conv2d_input_grad(const Tensor& grad_output, const Tensor& weight_values, const Tensor& weight_mask,
                         const Ints& weight_size, const Ints& input_size, const Ints& stride, const Ints& padding,
                         const Ints& dilation, int64_t groups, bool channels_last) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    const ConvGeometry g = check_conv2d_grad(grad_output, "weight", weight_values, weight_mask, weight_size, input_size,
                                             weight_size, stride, padding, dilation, groups, check_packed);
    Tensor grad_input = empty(input_size, grad_output.scalar_type(), channels_last);
    cpu::convolution_input_grad<T>(cpu::active(), torch_threads(), g, read_image<T>(grad_output),
                                   packed<T>(weight_values, weight_mask, product(weight_size)),
                                   write_image<T>(grad_input));
    return grad_input;
  });
}

Tensor conv2d_weight_grad(const Tensor& grad_output, const Tensor& input_values, const Tensor& input_mask,
                          const Ints& input_size, const Ints& weight_size, const Ints& stride, const Ints& padding,
                          const Ints& dilation, int64_t groups, bool channels_last, bool /*allow_tf32*/) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    const ConvGeometry g = check_conv2d_grad(grad_output, "input", input_values, input_mask, input_size, input_size,
                                             weight_size, stride, padding, dilation, groups, check_packed);
    Tensor grad_weight = empty(weight_size, grad_output.scalar_type(), channels_last);
    cpu::convolution_weight_grad<T>(cpu::active(), torch_threads(), g, read_image<T>(grad_output),
                                    packed<T>(input_values, input_mask, product(input_size)),
                                    grad_weight.mutable_data_ptr<T>(), channels_last);
    return grad_weight;
  });
}

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(CPU, m) {
  m.impl("kth_magnitude", TORCH_BOX(&swat::kth_magnitude));
  m.impl("compress", TORCH_BOX(&swat::compress));
  m.impl("take", TORCH_BOX(&swat::take));
  m.impl("decompress", TORCH_BOX(&swat::decompress));
  m.impl("decompress_part", TORCH_BOX(&swat::decompress_part));
  m.impl("conv2d", TORCH_BOX(&swat::conv2d));
  m.impl("conv2d_input_grad", TORCH_BOX(&swat::conv2d_input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&swat::conv2d_weight_grad));
}
