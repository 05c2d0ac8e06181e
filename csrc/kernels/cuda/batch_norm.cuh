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

// Arrays of [channels] in scratch memory after the sums: neighbouring channels are read side by side.
template <typename T>
Compute<T>* coefficients_in(void* scratch, const SumPlan& plan) {
  return reinterpret_cast<Compute<T>*>(static_cast<unsigned char*>(scratch) + sums_bytes(plan));
}

SWAT_HOST_DEVICE inline float load(int8_t code) { return code; }

}  // namespace swat::cuda
