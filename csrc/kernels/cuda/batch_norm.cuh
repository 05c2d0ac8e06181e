// What the passes of a batch normalisation share: channels of elements, codes, numbers for each channel.
#pragma once

#include <cmath>

#include "bits.h"
#include "channel_sums.cuh"

namespace swat::cuda {

inline constexpr int kNormRun = 8;  // elements of a thread, kNormThreads apart

// Calls f(element, channel) for the elements of this thread.
template <typename F>
__device__ inline void for_each_element(const NormShape& shape, int64_t numel, F&& f) {
  const int64_t pixels = shape.channels_last ? 1 : shape.pixels, channels = shape.channels;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kNormThreads * kNormRun) + threadIdx.x;
  // No division in the loop: kNormThreads elements on is some planes on, and some pixels.
  const int64_t steps = kNormThreads % pixels;
  const int planes = static_cast<int>(kNormThreads / pixels % channels);
  const int64_t plane = quotient(first, pixels);
  int64_t pixel = first - plane * pixels;
  int channel = static_cast<int>(plane - quotient(plane, channels) * channels);
#pragma unroll 4
  for (int i = 0; i < kNormRun; ++i) {
    const int64_t index = first + i * kNormThreads;
    if (index < numel) f(index, channel);
    pixel += steps;
    channel += planes;
    if (pixel >= pixels) {
      pixel -= pixels;
      ++channel;
    }
    if (channel >= channels) channel -= static_cast<int>(channels);
  }
}

inline int64_t element_blocks(int64_t numel) { return ceil_div(numel, kNormThreads * kNormRun); }

template <typename T>
__device__ inline double number_of(const NormWeight& weight, int64_t channel, double absent) {
  if (weight.data == nullptr) return absent;
  if (weight.narrow) return load(static_cast<const T*>(weight.data)[channel]);
  return static_cast<const Compute<T>*>(weight.data)[channel];
}

// output = (input - center) * factor + offset, for one channel.
template <typename T>
struct Affine {
  Compute<T> center, factor, offset;
};

// The mean is subtracted in two steps: its nearest number, where no digits of the input are lost, and the rest.
template <typename T>
__device__ inline Affine<T> affine_of(double mean, double invstd, const NormWeight& weight, const NormWeight& bias,
                                      int64_t channel) {
  const Compute<T> center = static_cast<Compute<T>>(mean);
  const double scaled = number_of<T>(weight, channel, 1) * invstd;
  return {center, static_cast<Compute<T>>(scaled),
          static_cast<Compute<T>>(std::fma(center - mean, scaled, number_of<T>(bias, channel, 0)))};
}

SWAT_HOST_DEVICE inline float load(int8_t code) { return code; }

}  // namespace swat::cuda
