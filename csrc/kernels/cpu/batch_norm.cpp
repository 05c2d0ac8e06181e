#include "batch_norm.h"

#include <algorithm>
#include <bit>
#include <cmath>
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

uint64_t mixed(uint64_t x) {
  x ^= x >> 32;
  x *= 0x9E3779B97F4A7C15u;
  x ^= x >> 29;
  x *= 0xD1B54A32D192ED03u;
  return x ^ (x >> 32);
}

// The statistics are part of the key, so that layers of equal seeds round differently.
uint32_t key_of(int64_t seed, int64_t channel, double mean, double invstd) {
  uint64_t key = mixed(static_cast<uint64_t>(seed));
  key = mixed(key ^ static_cast<uint64_t>(channel));
  key = mixed(key ^ std::bit_cast<uint64_t>(mean));
  return static_cast<uint32_t>(mixed(key ^ std::bit_cast<uint64_t>(invstd)) >> 32);
}

int64_t grain_tasks(const BatchNormShape& shape) {
  return std::max<int64_t>(1, kGrainBlocks * kBlockElements * shape.tasks() / std::max<int64_t>(1, shape.numel()));
}

// Per channel, the sum over parts, in their order.
void add_parts(std::vector<double>& sums, const BatchNormShape& shape) {
  for (int64_t i = 1; i < shape.parts; ++i) {
    for (int64_t c = 0; c < shape.channels; ++c) sums[c] += sums[i * shape.channels + c];
  }
}

// output = (input - center) * factor + offset, per channel.
template <typename T>
struct Affine {
  std::vector<T> center, factor, offset;

  explicit Affine(int64_t channels) : center(channels), factor(channels), offset(channels) {}

  // The mean is subtracted in two steps: its nearest T, where no digits of the input are lost, and the rest, which is returned.
  double set(int64_t c, double mean, double invstd, const T* weight, const T* bias) {
    center[c] = static_cast<T>(mean);
    const double rest = mean - center[c];
    const double scaled = weight == nullptr ? invstd : weight[c] * invstd;
    factor[c] = static_cast<T>(scaled);
    offset[c] = static_cast<T>((bias == nullptr ? 0 : bias[c]) - rest * scaled);
    return rest;
  }
};

}  // namespace

BatchNormShape batch_norm_shape(int64_t batch, int64_t channels, int64_t pixels, bool channels_last) {
  BatchNormShape shape{.batch = batch,
                       .channels = channels,
                       .pixels = pixels,
                       // With one pixel both layouts are the same, and vectors run over channels.
                       .channels_last = channels_last || pixels == 1,
                       .lines = 0,
                       .line = 0,
                       .block_lines = 0,
                       .parts = 0,
                       .chunk = 0};
  const int64_t numel = shape.numel();
  shape.line = shape.channels_last ? channels : pixels;
  shape.lines = shape.line == 0 ? 0 : numel / shape.line;
  shape.block_lines = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, shape.line));
  if (shape.channels_last) {
    shape.parts = std::clamp<int64_t>(numel / kPartElements, 1, kMostParts);
    shape.chunk = std::max<int64_t>(1, channels);
  } else {
    shape.parts =
        channels >= kFewChannels ? 1 : std::clamp<int64_t>(numel / kPartElements, 1, std::max<int64_t>(1, batch));
    shape.parts = std::min(shape.parts, kMostParts);
    // Small planes are read some at a time.
    shape.chunk =
        std::max<int64_t>({1, channels / kMostParts, std::min(channels, kPlaneRun / std::max<int64_t>(1, pixels))});
  }
  return shape;
}

template <typename T>
void batch_norm(const KernelTable& table, const Parallel& parallel, const BatchNormShape& shape, const T* input,
                const T* weight, const T* bias, double eps, Saved saved, int64_t seed, const BatchNormResult<T>& to) {
  const Kernels<T>& kernels = table.of<T>();
  const int64_t channels = shape.channels;
  const double count = static_cast<double>(shape.count());

  std::vector<double> shift(channels), sums(shape.parts * channels), products(shape.parts * channels);
  std::vector<T> least, greatest;
  if (saved == Saved::int8) {
    least.assign(shape.parts * channels, std::numeric_limits<T>::infinity());
    greatest.assign(shape.parts * channels, -std::numeric_limits<T>::infinity());
  }
  // Any element will do: what matters is to be near the mean, on the scale of the largest deviation.
  for (int64_t c = 0; c < channels; ++c) shift[c] = input[c * (shape.channels_last ? 1 : shape.pixels)];
  BatchNormParams<T> params{};
  params.shape = shape;
  params.saved = saved;
  params.input = input;
  params.shift = shift.data();
  params.sums = sums.data();
  params.products = products.data();
  params.least = least.empty() ? nullptr : least.data();
  params.greatest = greatest.data();
  parallel(shape.tasks(), grain_tasks(shape),
           [&](int64_t begin, int64_t end) { kernels.batch_norm_statistics(params, begin, end); });
  add_parts(sums, shape);
  add_parts(products, shape);
  for (int64_t i = channels; i < static_cast<int64_t>(least.size()); ++i) {
    least[i % channels] = std::min(least[i % channels], least[i]);
    greatest[i % channels] = std::max(greatest[i % channels], greatest[i]);
  }

  Affine<T> affine(channels);
  std::vector<T> code_factor(channels), code_offset(channels);
  std::vector<uint32_t> keys(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double about = sums[c] / count;
    const double mean = shift[c] + about;
    const double squares = products[c] - sums[c] * about;
    // Rounding may leave a sum of squares a little below zero; NaN stays.
    const double spread = squares < 0 ? 0 : squares;
    const double invstd = 1 / std::sqrt(spread / count + eps);
    to.mean[c] = mean;
    to.invstd[c] = invstd;
    to.variance[c] = spread / (count - 1);
    const double rest = affine.set(c, mean, invstd, weight, bias);
    double unit = 1;
    if (saved == Saved::int8) {
      const double largest = std::max(greatest[c] - mean, mean - least[c]) * invstd;
      to.scale[c] = std::isnan(mean) ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(largest / 127);
      unit = to.scale[c];
      keys[c] = key_of(seed, c, mean, invstd);
    }
    const double per_unit = std::isnormal(static_cast<T>(unit)) ? invstd / unit : 0;
    code_factor[c] = static_cast<T>(per_unit);
    code_offset[c] = static_cast<T>(-rest * per_unit);
  }
  params.center = affine.center.data();
  params.factor = affine.factor.data();
  params.offset = affine.offset.data();
  params.code_factor = code_factor.data();
  params.code_offset = code_offset.data();
  params.keys = keys.data();
  params.output = to.output;
  params.codes = to.codes;
  parallel(shape.blocks(), kGrainBlocks,
           [&](int64_t begin, int64_t end) { kernels.batch_norm_normalise(params, begin, end); });
}

template <typename T>
void batch_norm_backward(const KernelTable& table, const Parallel& parallel, const BatchNormShape& shape,
                         const T* grad_output, const BatchNormSaved<T>& from, T* grad_input, T* grad_weight,
                         T* grad_bias) {
  const Kernels<T>& kernels = table.of<T>();
  const int64_t channels = shape.channels;
  const double count = static_cast<double>(shape.count());
  const bool exact = from.form == Saved::exact;

  std::vector<double> shift(channels), sums(shape.parts * channels), products(shape.parts * channels);
  if (exact) std::copy_n(from.mean, channels, shift.begin());
  BatchNormParams<T> params{};
  params.shape = shape;
  params.saved = from.form;
  params.input = exact ? static_cast<const T*>(from.values) : nullptr;
  params.saved_codes = from.values;
  params.grad_output = grad_output;
  params.shift = shift.data();
  params.sums = sums.data();
  params.products = products.data();
  parallel(shape.tasks(), grain_tasks(shape), [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(kernels.batch_norm_scratch(shape));
    kernels.batch_norm_sums(params, begin, end, scratch.data());
  });
  add_parts(sums, shape);
  add_parts(products, shape);

  // With h the normalised value: grad_input = weight * invstd * (grad - mean(grad) - h * mean(grad * h)), of which the saved value
  // gives h = (saved - shift) * unit.
  std::vector<T> center(channels), slope(channels), grade(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double unit = exact ? from.invstd[c] : from.form == Saved::int8 ? from.scale[c] : 1;
    const double weighted = products[c] * unit;  // sum of grad * h
    const double scaled = (from.weight == nullptr ? 1 : from.weight[c]) * from.invstd[c];
    const double tilt = -scaled * weighted / count * unit;
    grad_weight[c] = static_cast<T>(weighted);
    grad_bias[c] = static_cast<T>(sums[c]);
    center[c] = static_cast<T>(shift[c]);
    slope[c] = static_cast<T>(scaled);
    grade[c] = static_cast<T>(tilt);
    offset[c] = static_cast<T>(-scaled * sums[c] / count - (shift[c] - center[c]) * tilt);
  }
  params.center = center.data();
  params.slope = slope.data();
  params.grade = grade.data();
  params.offset = offset.data();
  params.output = grad_input;
  parallel(shape.blocks(), kGrainBlocks, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(kernels.batch_norm_scratch(shape));
    kernels.batch_norm_input_grad(params, begin, end, scratch.data());
  });
}

#define SWAT_INSTANTIATE(T)                                                                                          \
  template void batch_norm(const KernelTable&, const Parallel&, const BatchNormShape&, const T*, const T*, const T*, \
                           double, Saved, int64_t, const BatchNormResult<T>&);                                       \
  template void batch_norm_backward(const KernelTable&, const Parallel&, const BatchNormShape&, const T*,            \
                                    const BatchNormSaved<T>&, T*, T*, T*);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
#undef SWAT_INSTANTIATE

}  // namespace swat::cpu
