#include "batch_norm.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace swat::cpu {
namespace {

constexpr int64_t kBlockElements = 1 << 12;  // so that what one pass over a block writes, the next finds in cache
constexpr int64_t kPartElements = 1 << 16;   // summed in one go: many parts would cost more to add up than they save
constexpr int64_t kMostParts = 64;
constexpr int64_t kPlaneRun = 512;
constexpr int64_t kFewChannels = 32;  // below this, planes of one sample are not tasks enough
constexpr int64_t kGrainBlocks = 8;   // below this a thread costs more than it saves

BatchNormShape cut(const NormShape& norm) {
  BatchNormShape shape{norm};
  // With one pixel both layouts are the same, and vectors run over channels.
  shape.channels_last = norm.channels_last || norm.pixels == 1;
  const int64_t numel = shape.numel(), channels = shape.channels;
  shape.line = shape.channels_last ? channels : shape.pixels;
  shape.lines = shape.line == 0 ? 0 : numel / shape.line;
  shape.block_lines = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, shape.line));
  if (shape.channels_last) {
    shape.parts = std::clamp<int64_t>(numel / kPartElements, 1, kMostParts);
    shape.chunk = std::max<int64_t>(1, channels);
  } else {
    shape.parts =
        channels >= kFewChannels ? 1 : std::clamp<int64_t>(numel / kPartElements, 1, std::max<int64_t>(1, shape.batch));
    shape.parts = std::min(shape.parts, kMostParts);
    // Small planes are read some at a time.
    shape.chunk = std::max<int64_t>(
        {1, channels / kMostParts, std::min(channels, kPlaneRun / std::max<int64_t>(1, shape.pixels))});
  }
  return shape;
}

int64_t grain_tasks(const BatchNormShape& shape) {
  return std::max<int64_t>(1, kGrainBlocks * kBlockElements * shape.tasks() / std::max<int64_t>(1, shape.numel()));
}

template <typename T>
double number_of(const NormWeight& weight, int64_t channel, double absent) {
  return weight.data == nullptr ? absent : static_cast<const T*>(weight.data)[channel];
}

// Sums of [parts, channels], and their memory.
template <typename T>
struct PartSums {
  const BatchNormShape& shape;
  std::vector<double> shift, sums, products;
  std::vector<T> least, greatest;

  PartSums(BatchNormParams<T>& params, bool extremes)
      : shape(params.shape),
        shift(shape.channels),
        sums(shape.parts * shape.channels),
        products(sums.size()),
        least(extremes ? sums.size() : 0, std::numeric_limits<T>::infinity()),
        greatest(least.size(), -std::numeric_limits<T>::infinity()) {
    params.shift = shift.data();
    params.sums = sums.data();
    params.products = products.data();
    params.least = extremes ? least.data() : nullptr;
    params.greatest = greatest.data();
  }

  // Of one channel, its parts in their order.
  NormSums of(int64_t channel) const {
    NormSums total;
    for (size_t i = channel; i < sums.size(); i += shape.channels) {
      NormSums part{.sum = sums[i], .product = products[i]};
      if (!least.empty()) {
        part.least = least[i];
        part.greatest = greatest[i];
      }
      total.add(part);
    }
    return total;
  }
};

}  // namespace

template <typename T>
void batch_norm(const KernelTable& table, const Parallel& parallel, const NormArguments<T, T>& arguments) {
  const Kernels<T>& kernels = table.of<T>();
  BatchNormParams<T> params{};
  params.shape = cut(arguments.shape);
  const BatchNormShape& shape = params.shape;
  const int64_t channels = shape.channels;
  params.saved = arguments.saved;
  params.input = arguments.input;
  PartSums<T> sums(params, arguments.saved == Saved::int8);
  // Any element will do: what matters is to be near the mean, on the scale of the largest deviation.
  for (int64_t c = 0; c < channels; ++c) sums.shift[c] = arguments.input[c * shape.plane()];
  parallel(shape.tasks(), grain_tasks(shape),
           [&](int64_t begin, int64_t end) { kernels.batch_norm_statistics(params, begin, end); });

  std::vector<T> center(channels), factor(channels), offset(channels), code_factor(channels), code_offset(channels);
  std::vector<uint32_t> keys(channels);
  const int64_t seed = arguments.seed == nullptr ? 0 : *arguments.seed;
  for (int64_t c = 0; c < channels; ++c) {
    const auto to = norm_channel<T>(sums.of(c), sums.shift[c], static_cast<double>(shape.count()), arguments.eps,
                                    number_of<T>(arguments.weight, c, 1), number_of<T>(arguments.bias, c, 0),
                                    arguments.saved, seed, c);
    arguments.mean[c] = to.mean;
    arguments.invstd[c] = to.invstd;
    arguments.variance[c] = to.variance;
    if (arguments.saved == Saved::int8) arguments.scale[c] = to.scale;
    center[c] = to.center;
    factor[c] = to.factor;
    offset[c] = to.offset;
    code_factor[c] = to.code_factor;
    code_offset[c] = to.code_offset;
    keys[c] = to.key;
  }
  params.center = center.data();
  params.factor = factor.data();
  params.offset = offset.data();
  params.code_factor = code_factor.data();
  params.code_offset = code_offset.data();
  params.keys = keys.data();
  params.output = arguments.output;
  params.codes = arguments.codes;
  parallel(shape.blocks(), kGrainBlocks,
           [&](int64_t begin, int64_t end) { kernels.batch_norm_normalise(params, begin, end); });
}

template <typename T>
void batch_norm_backward(const KernelTable& table, const Parallel& parallel, const NormGradArguments<T, T>& arguments) {
  const Kernels<T>& kernels = table.of<T>();
  BatchNormParams<T> params{};
  params.shape = cut(arguments.shape);
  const BatchNormShape& shape = params.shape;
  const int64_t channels = shape.channels;
  params.saved = arguments.saved;
  params.input = arguments.saved == Saved::exact ? static_cast<const T*>(arguments.values) : nullptr;
  params.saved_codes = arguments.values;
  params.grad_output = arguments.grad_output;
  PartSums<T> sums(params, false);
  for (int64_t c = 0; c < channels; ++c) sums.shift[c] = saved_shift(arguments.saved, arguments.mean[c]);
  parallel(shape.tasks(), grain_tasks(shape), [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(kernels.batch_norm_scratch(shape));
    kernels.batch_norm_sums(params, begin, end, scratch.data());
  });

  std::vector<T> center(channels), slope(channels), grade(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = arguments.saved == Saved::int8 ? arguments.scale[c] : 1;
    const auto to =
        norm_grad_channel<T>(sums.of(c), static_cast<double>(shape.count()), arguments.saved, arguments.mean[c],
                             arguments.invstd[c], scale, number_of<T>(arguments.weight, c, 1));
    static_cast<T*>(arguments.grad_weight)[c] = static_cast<T>(to.grad_weight);
    static_cast<T*>(arguments.grad_bias)[c] = static_cast<T>(to.grad_bias);
    center[c] = to.center;
    slope[c] = to.slope;
    grade[c] = to.grade;
    offset[c] = to.offset;
  }
  params.center = center.data();
  params.slope = slope.data();
  params.grade = grade.data();
  params.offset = offset.data();
  params.output = arguments.grad_input;
  parallel(shape.blocks(), kGrainBlocks, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(kernels.batch_norm_scratch(shape));
    kernels.batch_norm_input_grad(params, begin, end, scratch.data());
  });
}

#define SWAT_INSTANTIATE(T)                                                                  \
  template void batch_norm(const KernelTable&, const Parallel&, const NormArguments<T, T>&); \
  template void batch_norm_backward(const KernelTable&, const Parallel&, const NormGradArguments<T, T>&);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
#undef SWAT_INSTANTIATE

}  // namespace swat::cpu
