// The operators on the CPU: from torch's tensors to the kernels' pointers and back.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>

#include "../kernels/cpu/bias_grad.h"
#include "../kernels/cpu/convolution.h"
#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/packing.h"
#include "convolutions.h"
#include "cpu_common.h"
#include "cpu_half.h"
#include "library.h"
#include "selection.h"

namespace swat {
namespace {

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

template <typename T>
T select_magnitude(const Tensor& input, int64_t k) {
  // Order does not matter: what is dense in memory is read as it lies.
  const Tensor source = is_dense(input) ? input : torch::stable::contiguous(input);
  return cpu::kth_magnitude<T>(cpu::active(), torch_threads(), source.const_data_ptr<T>(), input.numel(), k);
}

Tensor kth_magnitude(const Tensor& input, int64_t k) {
  return dispatch("input", input, [&]<typename T>() {
    check_k(input, k);
    Tensor result = empty({}, input.scalar_type());
    *result.mutable_data_ptr<T>() = select_magnitude<T>(input, k);
    return result;
  });
}

// `source`, whose strides planes() takes, as words and ranks of `mask` and its values; those of `room` elements at least.
template <typename T>
std::pair<Tensor, int64_t> compress_planes(const Tensor& source, T threshold, int64_t room, const Tensor& mask) {
  const int64_t numel = source.numel();
  int64_t* const words = mask.mutable_data_ptr<int64_t>();
  std::optional<Tensor> values;
  int64_t count = 0;
  cpu::compress<T>(cpu::active(), torch_threads(), *planes<const T>(source, source.const_data_ptr<T>()), threshold,
                   reinterpret_cast<uint64_t*>(words), words + (numel + 63) / 64, [&](int64_t kept) {
                     count = kept;
                     values = empty({std::max(kept, room)}, source.scalar_type());
                     return values->template mutable_data_ptr<T>();
                   });
  return {*values, count};
}

// Drop what is kept past `most` elements, in logical order.
void trim(uint64_t* words, int64_t* ranks, int64_t numel, int64_t most) {
  int64_t rank = 0;
  for (int64_t i = 0; i < (numel + 63) / 64; ++i) {
    if (i % (cpu::kBlockBits / 64) == 0) ranks[i / (cpu::kBlockBits / 64)] = rank;
    while (rank + std::popcount(words[i]) > most) words[i] ^= std::bit_floor(words[i]);
    rank += std::popcount(words[i]);
  }
}

std::tuple<Tensor, Tensor> compress(const Tensor& input, const Tensor& threshold, std::optional<int64_t> keep,
                                    std::optional<int64_t> room) {
  return dispatch("input", input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const std::optional<KeptBounds> bounds = check_compress(input, threshold, keep, room);
    const bool as_it_lies = planes<const T>(input, input.const_data_ptr<T>()).has_value();
    const Tensor source = as_it_lies ? input : torch::stable::contiguous(input);
    const int64_t numel = input.numel(), length = room.value_or(0);
    const Tensor mask = empty({mask_words(numel)}, ScalarType::Long);
    const T limit = *threshold.const_data_ptr<T>();
    auto [values, count] = compress_planes<T>(source, limit, length, mask);
    if (bounds && (count > bounds->most || (limit > 0 && count < bounds->least))) {
      const T fresh = select_magnitude<T>(source, *keep);
      if (fresh != limit) std::tie(values, count) = compress_planes<T>(source, fresh, length, mask);
    }
    if (room && count > length) {
      int64_t* const words = mask.mutable_data_ptr<int64_t>();
      trim(reinterpret_cast<uint64_t*>(words), words + (numel + 63) / 64, numel, length);
      values = torch::stable::clone(torch::stable::narrow(values, 0, 0, length));
    } else if (room) {
      std::fill(values.template mutable_data_ptr<T>() + count, values.template mutable_data_ptr<T>() + length, T{0});
    }
    return {values, mask};
  });
}

std::tuple<Tensor, Tensor> select(const Tensor& input, Tensor threshold, Tensor state, std::optional<int64_t> room) {
  return select_by_state(input, threshold, state, room, InFloat<&kth_magnitude>::call, InFloat<&compress>::call);
}

Tensor take(const Tensor& input, const Tensor& mask, int64_t count) {
  return dispatch("input", input, [&]<typename T>() {
    const int64_t kept = check_mask("mask", mask, input.numel(), input);
    STD_TORCH_CHECK(count >= kept && count <= input.numel(), "count: expected from ", kept,
                    ", as the mask counts, to input.numel() = ", input.numel(), ", got ", count);
    Tensor values = empty({count}, input.scalar_type());
    const bool as_it_lies = planes<const T>(input, input.const_data_ptr<T>()).has_value();
    const Tensor source = as_it_lies ? input : torch::stable::contiguous(input);
    std::fill_n(values.mutable_data_ptr<T>() + kept, count - kept, T{0});
    if (kept > 0) {
      cpu::take<T>(cpu::active(), torch_threads(), packed<T>(values, mask, input.numel()),
                   *planes<const T>(source, source.const_data_ptr<T>()), values.mutable_data_ptr<T>());
    }
    return values;
  });
}

// The filters, slices of the first dimension of a weight, that are kept as a whole: int64, ascending.
Tensor whole_filters(const Tensor& mask, const Ints& size) {
  STD_TORCH_CHECK(!size.empty(), "size: expected at least one dimension");
  check_extents("size", size);
  const int64_t numel = product(size);
  check_mask("mask", mask, numel, mask);
  const std::vector<int64_t> found =
      cpu::whole_slices(reinterpret_cast<const uint64_t*>(mask.const_data_ptr<int64_t>()), numel, size[0]);
  Tensor filters = empty({static_cast<int64_t>(found.size())}, ScalarType::Long);
  std::copy(found.begin(), found.end(), filters.mutable_data_ptr<int64_t>());
  return filters;
}

// Elements [begin, end) of the first dimension of a packed tensor; of one without dimensions, its element.
Tensor unpack(const Tensor& values, const Tensor& mask, const Ints& size, int64_t begin, int64_t end,
              bool channels_last) {
  return dispatch("values", values, [&]<typename T>() {
    check_extents("size", size);
    const int64_t numel = product(size);
    check_packed("", values, mask, numel, values);
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

Tensor bias_grad(const Tensor& grad_output, int64_t dim) {
  return dispatch("grad_output", grad_output, [&]<typename T>() {
    check_dim(grad_output, dim);
    Tensor result = empty({grad_output.size(dim)}, grad_output.scalar_type());
    cpu::bias_grad<T>(cpu::active(), torch_threads(), ChannelImage(grad_output, dim, 3).read<T>(), write<T>(result));
    return result;
  });
}

// See convolutions.h.
struct Cpu {
  template <typename F>
  static auto dispatch(const char* name, const Tensor& tensor, F&& f) {
    return swat::dispatch(name, tensor, f);
  }
  static Tensor empty(const Ints& size, const Tensor& like, bool channels_last) {
    return swat::empty(size, like.scalar_type(), channels_last);
  }
  static void check_packed(const char* name, const Tensor& values, const Tensor& mask, int64_t numel,
                           const Tensor& like) {
    swat::check_packed(name, values, mask, numel, like);
  }
  template <typename T>
  static cpu::PackedView<T> packed(const Tensor& values, const Tensor& mask, int64_t numel) {
    return swat::packed<T>(values, mask, numel);
  }

  template <typename T>
  static void convolution(const Tensor&, const ConvGeometry& g, const ImageView<const T>& input,
                          const cpu::PackedView<T>& weight, const T* bias, const ImageView<T>& output) {
    cpu::convolution<T>(cpu::active(), torch_threads(), g, input, weight, bias, output);
  }
  template <typename T>
  static void input_grad(const Tensor&, const ConvGeometry& g, const ImageView<const T>& grad_output,
                         const cpu::PackedView<T>& weight, const ImageView<T>& grad_input) {
    cpu::convolution_input_grad<T>(cpu::active(), torch_threads(), g, grad_output, weight, grad_input);
  }
  template <typename T>
  static void weight_grad(const Tensor&, const ConvGeometry& g, const ImageView<const T>& grad_output,
                          const cpu::PackedView<T>& input, T* grad_weight, bool channels_last) {
    cpu::convolution_weight_grad<T>(cpu::active(), torch_threads(), g, grad_output, input, grad_weight, channels_last);
  }
};

}  // namespace
}  // namespace swat

SWAT_LIBRARY_IMPL(CPU, m) {
  using swat::InFloat;
  m.impl("kth_magnitude", TORCH_BOX(&InFloat<&swat::kth_magnitude>::call));
  m.impl("compress", TORCH_BOX(&InFloat<&swat::compress>::call));
  m.impl("select", TORCH_BOX(&swat::select));
  m.impl("take", TORCH_BOX(&InFloat<&swat::take>::call));
  m.impl("whole_filters", TORCH_BOX(&swat::whole_filters));
  m.impl("decompress", TORCH_BOX(&InFloat<&swat::decompress>::call));
  m.impl("decompress_part", TORCH_BOX(&InFloat<&swat::decompress_part>::call));
  m.impl("bias_grad", TORCH_BOX(&InFloat<&swat::bias_grad>::call));
  using Convolutions = swat::Convolutions<swat::Cpu>;
  m.impl("conv2d", TORCH_BOX(&InFloat<&Convolutions::conv2d>::call));
  m.impl("conv2d_input_grad", TORCH_BOX(&InFloat<&Convolutions::conv2d_input_grad>::call));
  m.impl("conv2d_weight_grad", TORCH_BOX(&InFloat<&Convolutions::conv2d_weight_grad>::call));
  m.impl("linear", TORCH_BOX(&InFloat<&Convolutions::linear>::call));
  m.impl("linear_input_grad", TORCH_BOX(&InFloat<&Convolutions::linear_input_grad>::call));
  m.impl("linear_weight_grad", TORCH_BOX(&InFloat<&Convolutions::linear_weight_grad>::call));
}
