// The operators on CUDA: from torch's tensors to the kernels' pointers and back, on torch's current stream.
//
// Nothing here waits for the device. Scratch and results come from torch's allocator, so that all of it can be captured in a CUDA
// graph; what is freed on return is reused by later work on the same stream alone, which is how torch's own operators do it.
#include <optional>
#include <tuple>

#include "../kernels/cuda/bits.h"
#include "../kernels/cuda/launchers.h"
#include "convolution_checks.h"
#include "cuda_common.h"
#include "library.h"

namespace swat {
namespace {

using namespace cuda_ops;

// Up to four dimensions, leading ones added.
template <typename T>
ImageView<T> image(const Tensor& tensor, T* data) {
  int64_t size[4] = {1, 1, 1, 1}, stride[4] = {0, 0, 0, 0};
  const int64_t lead = 4 - tensor.dim();
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    size[lead + i] = tensor.size(i);
    stride[lead + i] = tensor.stride(i);
  }
  return {data, size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
}
template <typename T>
ImageView<const T> read_image(const Tensor& tensor) {
  return image<const T>(tensor, read<T>(tensor));
}
template <typename T>
ImageView<T> write_image(const Tensor& tensor) {
  return image<T>(tensor, write<T>(tensor));
}

template <typename T>
cuda::PackedView<T> packed(const Tensor& values, const Tensor& mask, int64_t numel) {
  const int64_t* words = read<int64_t>(mask);
  return {read<T>(values), reinterpret_cast<const uint64_t*>(words), words + cuda::word_count(numel), numel,
          values.numel()};
}

// Launch the selection of the k-th magnitude of any tensor, where *condition is not 0.
template <typename T>
void launch_kth(const Tensor& input, int64_t k, T* result, const int32_t* condition, cudaStream_t stream) {
  // Order does not matter: what is dense in memory is read as it lies.
  const bool dense =
      input.is_contiguous() ||
      (input.dim() == 4 && input.stride(1) == 1 && input.stride(3) == input.size(1) &&
       input.stride(2) == input.size(3) * input.stride(3) && input.stride(0) == input.size(2) * input.stride(2));
  const Tensor source = dense ? input : torch::stable::contiguous(input);
  const Tensor memory = scratch(cuda::kth_magnitude_scratch(), input);
  check(cuda::kth_magnitude<T>({read<T>(source), input.numel(), k, result, write<void>(memory), condition}, stream),
        "kth_magnitude");
}

Tensor kth_magnitude(const Tensor& input, int64_t k) {
  return dispatch("input", input, [&]<typename T>() {
    STD_TORCH_CHECK(k >= 1 && k <= input.numel(), "k: expected from 1 to input.numel() = ", input.numel(), ", got ", k);
    const OnDevice device(input);
    Tensor result = empty({}, input.scalar_type(), input);
    launch_kth<T>(input, k, write<T>(result), nullptr, device.stream());
    return result;
  });
}

std::tuple<Tensor, Tensor> compress(const Tensor& input, const Tensor& threshold, std::optional<int64_t> keep,
                                    std::optional<int64_t> capacity) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    STD_TORCH_CHECK(threshold.numel() == 1, "threshold: expected one number, got size ", to_string(sizes(threshold)));
    check_same_dtype("threshold", threshold, input);
    check_same_device("threshold", threshold, input);
    check_capacity(input.numel(), keep, capacity);
    const OnDevice device(input);
    const cudaStream_t stream = device.stream();
    const int64_t numel = input.numel();
    const Tensor source = input.dim() <= 4 ? input : torch::stable::reshape(input, {numel});
    Tensor mask = empty({mask_words(numel)}, ScalarType::Long, input);
    const Tensor counters = empty({2}, ScalarType::Long, input);  // kept, and whether that is too many
    const Tensor fresh = empty({}, input.scalar_type(), input);
    cuda::CompressParams<T> params{};
    params.input = read_image<T>(source);
    params.threshold = read<T>(threshold);
    params.words = reinterpret_cast<uint64_t*>(write<int64_t>(mask));
    params.ranks = write<int64_t>(mask) + cuda::word_count(numel);
    params.kept = write<int64_t>(counters);
    const Tensor memory = scratch(cuda::compress_scratch(params), input);
    params.scratch = write<void>(memory);
    // Without a capacity the length is not known yet: half of the elements have room first.
    Tensor values = empty({capacity.value_or((numel + 1) / 2)}, input.scalar_type(), input);
    params.values = write<T>(values);
    params.capacity = values.numel();
    check(cuda::compress(params, stream), "compress");
    if (!capacity) {
      // This alone waits for the device, and cannot be captured in a graph.
      const Tensor on_host = torch::stable::to(counters, std::nullopt, std::nullopt, torch::stable::Device("cpu"));
      const int64_t kept = *read<int64_t>(on_host);
      if (kept <= params.capacity) return {torch::stable::clone(torch::stable::narrow(values, 0, 0, kept)), mask};
      values = empty({kept}, input.scalar_type(), input);
      params.values = write<T>(values);
      params.capacity = kept;
      check(cuda::compress(params, stream), "compress");
      return {values, mask};
    }
    if (numel > 0) {
      int32_t* const condition = reinterpret_cast<int32_t*>(write<int64_t>(counters) + 1);
      check(cuda::exceeds(params.kept, *capacity, condition, stream), "compress");
      launch_kth<T>(source, *keep, write<T>(fresh), condition, stream);
      params.threshold = read<T>(fresh);
      params.condition = condition;
      check(cuda::compress(params, stream), "compress");
      check(cuda::trim(params.words, params.ranks, params.kept, numel, *capacity, stream), "compress");
      check(cuda::clear_tail(params.values, params.kept, *capacity, stream), "compress");
    }
    return {values, mask};
  });
}

Tensor decompress(const Tensor& values, const Tensor& mask, const Ints& size, bool channels_last) {
  return dispatch("values", values, [&]<typename T>() {
    const int64_t numel = product(size);
    check_packed_layout("packed", values, mask, numel);
    check_same_device("mask", mask, values);
    STD_TORCH_CHECK(!channels_last || size.size() == 4, "channels_last: expected a size of 4 dimensions, got ",
                    to_string(size));
    const OnDevice device(values);
    Tensor output = empty(size, values.scalar_type(), values, channels_last);
    const auto view =
        channels_last ? write_image<T>(output) : ImageView<T>{write<T>(output), 1, 1, 1, numel, numel, numel, numel, 1};
    check(cuda::decompress<T>({packed<T>(values, mask, numel), view}, device.stream()), "decompress");
    return output;
  });
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& weight_values,
              const Tensor& weight_mask, const std::optional<Tensor>& /*input_values*/,
              const std::optional<Tensor>& /*input_mask*/, const Ints& stride, const Ints& padding,
              const Ints& dilation, int64_t groups, bool channels_last, bool /*retake_weight*/) {
  return dispatch("input", input, [&]<typename T>() {
    const ConvGeometry g = check_conv2d(input, weight, bias, weight_values, weight_mask, stride, padding, dilation,
                                        groups, check_packed_layout);
    std::optional<Tensor> offsets;
    if (bias) offsets = torch::stable::contiguous(*bias);
    const OnDevice device(input);
    Tensor output =
        empty({g.batch, g.out_channels, g.out_height, g.out_width}, input.scalar_type(), input, channels_last);
    cuda::ConvolutionParams<T> params{g,
                                      read_image<T>(input),
                                      packed<T>(weight_values, weight_mask, weight.numel()),
                                      offsets ? read<T>(*offsets) : nullptr,
                                      write_image<T>(output),
                                      nullptr};
    const Tensor memory = scratch(cuda::convolution_scratch(params), input);
    params.scratch = write<void>(memory);
    check(cuda::convolution(params, device.stream()), "conv2d");
    return output;
  });
}

Tensor conv2d_input_grad(const Tensor& grad_output, const Tensor& weight_values, const Tensor& weight_mask,
                         const Ints& weight_size, const Ints& input_size, const Ints& stride, const Ints& padding,
                         const Ints& dilation, int64_t groups, bool channels_last) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    const ConvGeometry g = check_conv2d_grad(grad_output, "weight", weight_values, weight_mask, weight_size, input_size,
                                             weight_size, stride, padding, dilation, groups, check_packed_layout);
    const OnDevice device(grad_output);
    Tensor grad_input = empty(input_size, grad_output.scalar_type(), grad_output, channels_last);
    cuda::InputGradParams<T> params{g, read_image<T>(grad_output),
                                    packed<T>(weight_values, weight_mask, product(weight_size)),
                                    write_image<T>(grad_input), nullptr};
    const Tensor memory = scratch(cuda::convolution_input_grad_scratch(params), grad_output);
    params.scratch = write<void>(memory);
    check(cuda::convolution_input_grad(params, device.stream()), "conv2d_input_grad");
    return grad_input;
  });
}

Tensor conv2d_weight_grad(const Tensor& grad_output, const Tensor& input_values, const Tensor& input_mask,
                          const Ints& input_size, const Ints& weight_size, const Ints& stride, const Ints& padding,
                          const Ints& dilation, int64_t groups, bool channels_last, bool allow_tf32) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    const ConvGeometry g = check_conv2d_grad(grad_output, "input", input_values, input_mask, input_size, input_size,
                                             weight_size, stride, padding, dilation, groups, check_packed_layout);
    const OnDevice device(grad_output);
    Tensor grad_weight = empty(weight_size, grad_output.scalar_type(), grad_output, channels_last);
    cuda::WeightGradParams<T> params{g,
                                     read_image<T>(grad_output),
                                     packed<T>(input_values, input_mask, product(input_size)),
                                     write<T>(grad_weight),
                                     channels_last,
                                     allow_tf32,
                                     nullptr};
    const Tensor memory = scratch(cuda::convolution_weight_grad_scratch(params), grad_output);
    params.scratch = write<void>(memory);
    check(cuda::convolution_weight_grad(params, device.stream()), "conv2d_weight_grad");
    return grad_weight;
  });
}

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(SWAT_CUDA_KEY, m) {
  m.impl("kth_magnitude", TORCH_BOX(&swat::kth_magnitude));
  m.impl("compress", TORCH_BOX(&swat::compress));
  m.impl("decompress", TORCH_BOX(&swat::decompress));
  m.impl("conv2d", TORCH_BOX(&swat::conv2d));
  m.impl("conv2d_input_grad", TORCH_BOX(&swat::conv2d_input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&swat::conv2d_weight_grad));
}
