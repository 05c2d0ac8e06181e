// Batch normalisation, as the kernels of every device see it: its arguments, what is computed once a channel, and the codes. T is how
// elements are stored, C what they are computed in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace swat {

// In what form a batch normalisation keeps what its backward pass needs of the input.
enum class Saved {
  exact,  // the input itself
  bf16,   // bfloat16 of the normalised value
  int8,  // the normalised value in units of its channel's `scale`, rounded to one of the two nearest integers at random
};

// A dense [batch, channels, pixels] tensor: `channels_last` is [batch * pixels][channels] in memory.
struct NormShape {
  int64_t batch, channels, pixels;
  bool channels_last;

  SWAT_HOST_DEVICE int64_t numel() const { return batch * channels * pixels; }
  SWAT_HOST_DEVICE int64_t count() const { return batch * pixels; }
  SWAT_HOST_DEVICE int64_t plane() const { return channels_last ? 1 : pixels; }  // from one channel to the next
};

// A number for each channel in T, or in C: half layers may have float weights.
struct NormWeight {
  const void* data;  // null: 1 for a weight, 0 for a bias
  bool narrow;       // whether it is T
};

// output = (input - mean) / sqrt(variance + eps) * weight + bias. Arrays are [channels], codes of all elements in the order of memory.
template <typename T, typename C>
struct NormArguments {
  NormShape shape;
  const T* input;
  NormWeight weight, bias;
  double eps;
  Saved saved;
  const int64_t* seed;  // null: 0
  T* output;
  double *mean, *invstd, *variance;  // the variance with the divisor count - 1
  void* codes;                       // unless exact
  C* scale;                          // int8: the unit of the codes
};

template <typename T, typename C>
struct NormGradArguments {
  NormShape shape;
  const T* grad_output;
  Saved saved;
  const void* values;  // the input or its codes
  const C* scale;      // int8
  const double *mean, *invstd;
  NormWeight weight;
  T* grad_input;
  void *grad_weight, *grad_bias;
  bool narrow;  // whether these are T
};

// ---- Once a channel ---------------------------------------------------------------------------------------------------------

// Sums over elements of a channel, and where they are asked for its extremes; of nothing at first.
struct NormSums {
  double sum = 0, product = 0;
  double least = INFINITY, greatest = -INFINITY;

  SWAT_HOST_DEVICE void add(const NormSums& other) {
    sum += other.sum;
    product += other.product;
    least = other.least < least ? other.least : least;
    greatest = other.greatest > greatest ? other.greatest : greatest;
  }
};

SWAT_HOST_DEVICE inline uint64_t mixed(uint64_t x) {
  x ^= x >> 32;
  x *= 0x9E3779B97F4A7C15u;
  x ^= x >> 29;
  x *= 0xD1B54A32D192ED03u;
  return x ^ (x >> 32);
}

// The statistics are part of the key, so that layers of equal seeds round differently.
SWAT_HOST_DEVICE inline uint32_t key_of(int64_t seed, int64_t channel, double mean, double invstd) {
  uint64_t bits[2];
  memcpy(&bits[0], &mean, sizeof(mean));
  memcpy(&bits[1], &invstd, sizeof(invstd));
  const uint64_t key = mixed(mixed(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(channel));
  return static_cast<uint32_t>(mixed(mixed(key ^ bits[0]) ^ bits[1]) >> 32);
}

template <typename C>
struct NormChannel {
  double mean, invstd, variance;
  C center, factor, offset;    // output = (input - center) * factor + offset
  C scale;                     // of the codes; NaN where the channel is not all finite, so that its gradients show it
  C code_factor, code_offset;  // code = (input - center) * code_factor + code_offset
  uint32_t key;                // of the random numbers
};

// From the sums of x - shift and of its square over `count` elements x.
template <typename C>
SWAT_HOST_DEVICE inline NormChannel<C> norm_channel(const NormSums& sums, double shift, double count, double eps,
                                                    double weight, double bias, Saved saved, int64_t seed,
                                                    int64_t channel) {
  NormChannel<C> to{};
  const double about = sums.sum / count;
  const double squares = sums.product - sums.sum * about;
  // Rounding may leave a sum of squares a little below zero; NaN stays, and is what infinities make.
  const double spread = squares < 0 ? 0 : squares;
  to.mean = shift + about;
  to.invstd = 1 / std::sqrt(spread / count + eps);
  to.variance = spread / (count - 1);
  // The mean is subtracted in two steps: its nearest number, where no digits of the input are lost, and the rest.
  to.center = static_cast<C>(to.mean);
  const double rest = to.mean - to.center, scaled = weight * to.invstd;
  to.factor = static_cast<C>(scaled);
  to.offset = static_cast<C>(bias - rest * scaled);
  double unit = 1;
  if (saved == Saved::int8) {
    const double above = sums.greatest - to.mean, below = to.mean - sums.least;
    to.scale = static_cast<C>((above > below ? above : below) * to.invstd / 127);
    to.key = key_of(seed, channel, to.mean, to.invstd);
    unit = to.scale;
  }
  // Of a channel without a spread all codes are zero.
  const double per_unit = unit > 0x1p-126 ? to.invstd / unit : 0;
  to.code_factor = static_cast<C>(per_unit);
  to.code_offset = static_cast<C>(-rest * per_unit);
  return to;
}

template <typename C>
struct NormGradChannel {
  double grad_weight, grad_bias;
  C center, slope, grade, offset;  // grad_input = grad * slope + (saved - center) * grade + offset
};

// What is subtracted of a saved value before it is multiplied and summed.
SWAT_HOST_DEVICE inline double saved_shift(Saved saved, double mean) { return saved == Saved::exact ? mean : 0; }

// From the sums of the gradient and of its products with saved - shift. With h the normalised value,
// grad_input = weight * invstd * (grad - mean(grad) - h * mean(grad * h)), of which the saved value gives h = (saved - shift) * unit.
template <typename C>
SWAT_HOST_DEVICE inline NormGradChannel<C> norm_grad_channel(const NormSums& sums, double count, Saved saved,
                                                             double mean, double invstd, double scale, double weight) {
  const double shift = saved_shift(saved, mean);
  const double unit = saved == Saved::exact ? invstd : saved == Saved::int8 ? scale : 1;
  const double scaled = weight * invstd;
  NormGradChannel<C> to{};
  to.grad_weight = sums.product * unit;
  to.grad_bias = sums.sum;
  const double tilt = -scaled * to.grad_weight / count * unit;
  to.center = static_cast<C>(shift);
  to.slope = static_cast<C>(scaled);
  to.grade = static_cast<C>(tilt);
  to.offset = static_cast<C>(-scaled * sums.sum / count - (shift - to.center) * tilt);
  return to;
}

// ---- Codes ------------------------------------------------------------------------------------------------------------------

// A number in [0, 1) that depends on the element and the key of its channel alone.
SWAT_HOST_DEVICE inline float random_fraction(uint32_t index, uint32_t key) {
  uint32_t h = (index * 0x9E3779B1u) ^ key;
  h = (h ^ (h >> 16)) * 0xA3D95FA5u;
  h = (h ^ (h >> 15)) * 0xD6E8FEB7u;
  h ^= h >> 16;
  return static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f;
}

// floor(value + fraction) in [-127, 127], of a value in this range or hardly beyond; of NaN, whose conversion would be undefined, -127.
// The conversion rounds towards zero, so it is done above zero.
template <typename C>
SWAT_HOST_DEVICE inline int8_t int8_code(C value, float fraction) {
  const C moved = value + C{128} + fraction;
  const int32_t code = static_cast<int32_t>(moved > C{1} ? moved : C{1}) - 128;
  return static_cast<int8_t>(code < 127 ? code : 127);
}

}  // namespace swat
