// The operators on CUDA: from torch's tensors to the kernels' pointers and back, on torch's current stream.
//
// Nothing here waits for the device. Scratch and results come from torch's allocator, so that all of it can be captured in a CUDA
// graph; what is freed on return is reused by later work on the same stream alone, which is how torch's own operators do it.
#include <optional>
#include <tuple>

#include "../kernels/cuda/bits.h"
#include "../kernels/cuda/launchers.h"
#include "convolutions.h"
#include "cuda_common.h"
#include "library.h"
#include "selection.h"

namespace swat {
namespace {

using namespace cuda_ops;

// Up to four dimensions, leading ones added.
template <typename T>
ImageView<T> any_image(const Tensor& tensor, T* data) {
  int64_t size[4] = {1, 1, 1, 1}, stride[4] = {0, 0, 0, 0};
  const int64_t lead = 4 - tensor.dim();
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    size[lead + i] = tensor.size(i);
    stride[lead + i] = tensor.stride(i);
  }
  return {data, size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
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
  const Tensor source = is_dense(input) ? input : torch::stable::contiguous(input);
  const Tensor memory = scratch(cuda::kth_magnitude_scratch(), input);
  check(cuda::kth_magnitude<T>({read<T>(source), input.numel(), k, result, write<void>(memory), condition}, stream),
        "kth_magnitude");
}

Tensor kth_magnitude(const Tensor& input, int64_t k) {
  return dispatch("input", input, [&]<typename T>() {
    check_k(input, k);
    const OnDevice device(input);
    Tensor result = empty({}, input.scalar_type(), input);
    launch_kth<T>(input, k, write<T>(result), nullptr, device.stream());
    return result;
  });
}

std::tuple<Tensor, Tensor> compress(const Tensor& input, const Tensor& threshold, std::optional<int64_t> keep,
                                    std::optional<int64_t> room) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const std::optional<KeptBounds> bounds = check_compress(input, threshold, keep, room);
    const OnDevice device(input);
    const cudaStream_t stream = device.stream();
    const int64_t numel = input.numel();
    const Tensor source = input.dim() <= 4 ? input : torch::stable::reshape(input, {numel});
    Tensor mask = empty({mask_words(numel)}, ScalarType::Long, input);
    const Tensor counters = empty({2}, ScalarType::Long, input);  // kept, and whether to select anew
    const Tensor fresh = empty({}, input.scalar_type(), input);
    cuda::CompressParams<T> params{};
    params.input = any_image(source, read<T>(source));
    params.threshold = read<T>(threshold);
    params.words = reinterpret_cast<uint64_t*>(write<int64_t>(mask));
    params.ranks = write<int64_t>(mask) + cuda::word_count(numel);
    params.kept = write<int64_t>(counters);
    int32_t* const condition = reinterpret_cast<int32_t*>(write<int64_t>(counters) + 1);
    const Tensor memory = scratch(cuda::compress_scratch(params), input);
    params.scratch = write<void>(memory);
    // Without room and budget the length is not known yet: half of the elements have room first.
    Tensor values = empty({room ? *room : bounds ? bounds->most : (numel + 1) / 2}, input.scalar_type(), input);
    params.values = write<T>(values);
    params.capacity = values.numel();
    check(cuda::compress(params, stream), "compress");
    if (bounds && numel > 0) {
      check(cuda::outside(params.kept, bounds->least, bounds->most, params.threshold, condition, stream), "compress");
      launch_kth<T>(source, *keep, write<T>(fresh), condition, stream);
      params.threshold = read<T>(fresh);
      params.condition = condition;
      check(cuda::compress(params, stream), "compress");
    }
    if (room) {
      check(cuda::trim(params.words, params.ranks, params.kept, numel, *room, stream), "compress");
      check(cuda::clear_tail(params.values, params.kept, *room, stream), "compress");
      return {values, mask};
    }
    // This alone waits for the device, and cannot be captured in a graph.
    const Tensor on_host = torch::stable::to(counters, std::nullopt, std::nullopt, torch::stable::Device("cpu"));
    const int64_t kept = *read<int64_t>(on_host);
    if (kept <= params.capacity) return {torch::stable::clone(torch::stable::narrow(values, 0, 0, kept)), mask};
    // Ties beyond the bound, or more than half: once more with room for all, by the threshold that was used last.
    if (params.condition && *reinterpret_cast<const int32_t*>(read<int64_t>(on_host) + 1) == 0) {
      params.threshold = read<T>(threshold);
    }
    params.condition = nullptr;
    values = empty({kept}, input.scalar_type(), input);
    params.values = write<T>(values);
    params.capacity = kept;
    check(cuda::compress(params, stream), "compress");
    return {values, mask};
  });
}

std::tuple<Tensor, Tensor> select(const Tensor& input, Tensor threshold, Tensor state, std::optional<int64_t> room) {
  return select_by_state(input, threshold, state, room, kth_magnitude, compress);
}

// Samples [begin, end) of the dense tensor, where `size` has any; all of it otherwise.
Tensor unpack(const Tensor& values, const Tensor& mask, Ints size, int64_t begin, int64_t end, bool channels_last) {
  return dispatch("values", values, [&]<typename T>() {
    check_extents("size", size);
    const int64_t numel = product(size);
    check_packed_layout("", values, mask, numel, values);
    STD_TORCH_CHECK(!channels_last || size.size() == 4, "channels_last: expected a size of 4 dimensions, got ",
                    to_string(size));
    const OnDevice device(values);
    int64_t first = 0;
    if (!size.empty()) {
      first = size[0] == 0 ? 0 : numel / size[0] * begin;
      size[0] = end - begin;
    }
    Tensor output = empty(size, values.scalar_type(), values, channels_last);
    const int64_t count = output.numel();
    const auto view = channels_last ? image(output, write<T>(output))
                                    : ImageView<T>{write<T>(output), 1, 1, 1, count, count, count, count, 1};
    check(cuda::decompress<T>({packed<T>(values, mask, numel), view, first}, device.stream()), "decompress");
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

// PyTorch's own sum: on CUDA its order follows from the sizes and strides alone.
Tensor bias_grad(const Tensor& grad_output, int64_t dim) {
  check_dim(grad_output, dim);
  Ints others;
  for (int64_t i = 0; i < grad_output.dim(); ++i) {
    if (i != dim) others.push_back(i);
  }
  return others.empty() ? torch::stable::clone(grad_output) : torch::stable::sum(grad_output, others);
}

// See convolutions.h. The weight gradient is left to PyTorch's kernels: CUDA.md counts why.
struct Cuda {
  template <typename F>
  static auto dispatch(const char* name, const Tensor& tensor, F&& f) {
    return cuda_ops::dispatch(name, tensor, f);
  }
  static Tensor empty(const Ints& size, const Tensor& like, bool channels_last) {
    return cuda_ops::empty(size, like.scalar_type(), like, channels_last);
  }
  static void check_packed(const char* name, const Tensor& values, const Tensor& mask, int64_t numel,
                           const Tensor& like) {
    check_packed_layout(name, values, mask, numel, like);
  }
  template <typename T>
  static cuda::PackedView<T> packed(const Tensor& values, const Tensor& mask, int64_t numel) {
    return swat::packed<T>(values, mask, numel);
  }

  template <typename T>
  static void convolution(const Tensor& like, const ConvGeometry& g, const ImageView<const T>& input,
                          const cuda::PackedView<T>& weight, const T* bias, const ImageView<T>& output) {
    const OnDevice device(like);
    cuda::ConvolutionParams<T> params{g, input, weight, bias, output, nullptr};
    const Tensor memory = scratch(cuda::convolution_scratch(params), like);
    params.scratch = write<void>(memory);
    check(cuda::convolution(params, device.stream()), "convolution");
  }
  template <typename T>
  static void input_grad(const Tensor& like, const ConvGeometry& g, const ImageView<const T>& grad_output,
                         const cuda::PackedView<T>& weight, const ImageView<T>& grad_input) {
    const OnDevice device(like);
    cuda::InputGradParams<T> params{g, grad_output, weight, grad_input, nullptr};
    const Tensor memory = scratch(cuda::convolution_input_grad_scratch(params), like);
    params.scratch = write<void>(memory);
    check(cuda::convolution_input_grad(params, device.stream()), "input gradient");
  }
};

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(SWAT_CUDA_KEY, m) {
  m.impl("kth_magnitude", TORCH_BOX(&swat::kth_magnitude));
  m.impl("compress", TORCH_BOX(&swat::compress));
  m.impl("select", TORCH_BOX(&swat::select));
  m.impl("decompress", TORCH_BOX(&swat::decompress));
  m.impl("decompress_part", TORCH_BOX(&swat::decompress_part));
  m.impl("bias_grad", TORCH_BOX(&swat::bias_grad));
  using Convolutions = swat::Convolutions<swat::Cuda>;
  m.impl("conv2d", TORCH_BOX(&Convolutions::conv2d));
  m.impl("conv2d_input_grad", TORCH_BOX(&Convolutions::conv2d_input_grad));
  m.impl("linear", TORCH_BOX(&Convolutions::linear));
  m.impl("linear_input_grad", TORCH_BOX(&Convolutions::linear_input_grad));
}
