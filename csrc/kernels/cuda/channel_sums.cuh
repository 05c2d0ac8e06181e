// Sums over all elements of each channel, in double and in an order that depends on shapes alone: a block sums a part of a channel, or
// of neighbouring channels, and a warp then adds up the parts of each.
//
// Double costs little: two operations an element, where the GPUs that this is for do several for each float they read.
#pragma once

#include "layers.h"
#include "warp.cuh"

namespace swat::cuda {

inline constexpr int kNormThreads = 256;
inline constexpr int kNormWarps = kNormThreads / kWarp;

using Sums = NormSums;

// Every lane gets the sum over the warp.
template <bool kExtremes>
__device__ inline void add_lanes(Sums& sums) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Sums other;
    other.sum = __shfl_xor_sync(kAllLanes, sums.sum, step);
    other.product = __shfl_xor_sync(kAllLanes, sums.product, step);
    if (kExtremes) {
      other.least = __shfl_xor_sync(kAllLanes, sums.least, step);
      other.greatest = __shfl_xor_sync(kAllLanes, sums.greatest, step);
    }
    sums.add(other);
  }
}

// How the elements of a channel are cut into parts, and threads into channels.
struct SumPlan {
  NormShape shape;
  int parts;
  int width;  // channels of a block, a power of two; channels_last alone
};

inline SumPlan sum_plan(const NormShape& shape) {
  constexpr int64_t kPart = 4096;       // elements of a channel that are worth a block
  constexpr int64_t kBlocks = 2048;     // enough to fill a GPU
  constexpr int64_t kMostParts = 1024;  // a warp adds them up
  int width = 1;
  if (shape.channels_last) {
    while (width < kWarp && width < shape.channels) width *= 2;
  }
  const int64_t columns = ceil_div(shape.channels, width);
  int64_t parts = shape.batch * shape.pixels * width / kPart;
  const int64_t wanted = ceil_div(kBlocks, columns > 0 ? columns : 1);
  parts = parts < wanted ? parts : wanted;
  parts = parts < kMostParts ? parts : kMostParts;
  return {shape, static_cast<int>(parts < 1 ? 1 : parts), width};
}

inline size_t sums_bytes(const SumPlan& plan) { return plan.shape.channels * plan.parts * sizeof(Sums); }

// The first element of a channel that a part covers.
__device__ inline int64_t begin_of(const SumPlan& plan, int part) {
  const int64_t count = plan.shape.batch * plan.shape.pixels;
  return part == plan.parts ? count : quotient(count, plan.parts) * part;
}

// A source has kExtremes, Channel channel(c), and add(channel, element, sums).
template <typename Source>
__global__ void __launch_bounds__(kNormThreads) sum_planes(SumPlan plan, Source source, Sums* partial) {
  SWAT_SHARED(shared, double[4][kNormWarps]);
  const NormShape& shape = plan.shape;
  const int64_t c = blockIdx.x / plan.parts;
  const int part = static_cast<int>(blockIdx.x % plan.parts);
  const int64_t first = begin_of(plan, part) + threadIdx.x, last = begin_of(plan, part + 1);
  const auto channel = source.channel(c);
  // No division in the loop: kNormThreads elements on is some samples on, and some pixels.
  const int64_t stride = shape.channels * shape.pixels, pixels = kNormThreads % shape.pixels;
  const int64_t step = kNormThreads / shape.pixels * stride + pixels, carry = stride - shape.pixels;
  const int64_t sample = quotient(first, shape.pixels);
  int64_t pixel = first - sample * shape.pixels;
  int64_t at = sample * stride + c * shape.pixels + pixel;
  Sums sums;
#pragma unroll 4
  for (int64_t i = first; i < last; i += kNormThreads) {
    source.add(channel, at, sums);
    pixel += pixels;
    at += step;
    if (pixel >= shape.pixels) {
      pixel -= shape.pixels;
      at += carry;
    }
  }
  add_lanes<Source::kExtremes>(sums);
  if (lane_id() == 0) {
    const int warp = threadIdx.x / kWarp;
    shared[0][warp] = sums.sum;
    shared[1][warp] = sums.product;
    shared[2][warp] = sums.least;
    shared[3][warp] = sums.greatest;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Sums total;
  for (int i = 0; i < kNormWarps; ++i) {
    Sums other;
    other.sum = shared[0][i];
    other.product = shared[1][i];
    other.least = shared[2][i];
    other.greatest = shared[3][i];
    total.add(other);
  }
  partial[c * plan.parts + part] = total;
}

// The same in channels_last: `width` channels side by side, and as many rows of them as there are threads for.
template <typename Source>
__global__ void __launch_bounds__(kNormThreads) sum_rows(SumPlan plan, Source source, Sums* partial) {
  SWAT_SHARED(shared, double[4][kNormThreads]);
  const int64_t channels = plan.shape.channels;
  const int part = static_cast<int>(blockIdx.x % plan.parts), together = kNormThreads / plan.width;
  const int64_t c = static_cast<int64_t>(blockIdx.x / plan.parts) * plan.width + threadIdx.x % plan.width;
  const int64_t first = begin_of(plan, part) + threadIdx.x / plan.width, last = begin_of(plan, part + 1);
  Sums sums;
  if (c < channels) {
    const auto channel = source.channel(c);
#pragma unroll 4
    for (int64_t row = first; row < last; row += together) source.add(channel, row * channels + c, sums);
  }
  for (int step = together / 2; step > 0; step /= 2) {
    const int thread = threadIdx.x;
    shared[0][thread] = sums.sum;
    shared[1][thread] = sums.product;
    shared[2][thread] = sums.least;
    shared[3][thread] = sums.greatest;
    __syncthreads();
    if (thread < step * plan.width) {
      Sums other;
      other.sum = shared[0][thread + step * plan.width];
      other.product = shared[1][thread + step * plan.width];
      other.least = shared[2][thread + step * plan.width];
      other.greatest = shared[3][thread + step * plan.width];
      sums.add(other);
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < plan.width && c < channels) partial[c * plan.parts + part] = sums;
}

template <typename Source>
inline void launch_sums(const SumPlan& plan, const Source& source, Sums* partial, cudaStream_t stream) {
  const int64_t blocks = ceil_div(plan.shape.channels, plan.width) * plan.parts;
  if (plan.shape.channels_last) {
    SWAT_LAUNCH(sum_rows<Source>, blocks, kNormThreads, 0, stream, plan, source, partial);
  } else {
    SWAT_LAUNCH(sum_planes<Source>, blocks, kNormThreads, 0, stream, plan, source, partial);
  }
}

// A warp's channel: its parts added up, the same in every lane.
__device__ inline Sums total_of(const Sums* partial, int64_t channel, int parts) {
  Sums total;
  for (int i = lane_id(); i < parts; i += kWarp) total.add(partial[channel * parts + i]);
  add_lanes<true>(total);
  return total;
}

}  // namespace swat::cuda
