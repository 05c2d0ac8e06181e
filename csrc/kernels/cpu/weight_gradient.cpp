#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "convolution.h"
#include "depthwise_gradient.h"
#include "packing.h"
#include "weight_grad_plan.h"

namespace swat::cpu {
namespace {

// A 1x1 convolution without stride sees no neighbours: join rows that lie evenly in dy, so that tiles need not end with them.
template <typename T>
void join_pixels(ConvGeometry& g, ImageView<const T>& grad) {
  const bool pointwise = g.taps() == 1 && g.stride_height == 1 && g.stride_width == 1 && g.pad_top == 0 &&
                         g.pad_left == 0 && g.in_height == g.out_height && g.in_width == g.out_width;
  if (!pointwise || !rows_join(grad)) return;
  join_rows(grad);
  g.in_width = g.out_width = grad.width;
  g.in_height = g.out_height = grad.height;
}

// Whether none of them is infinite or NaN. Written on bits, so that a vector is tested at a time.
template <typename T>
bool all_finite(const Parallel& parallel, const T* data, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kExponent = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
  std::atomic<bool> finite = true;
  parallel(count, 1 << 15, [&](int64_t begin, int64_t end) {
    Bits found = 0;
    for (int64_t i = begin; i < end; ++i) {
      // Adding one to a full exponent carries into the sign.
      found |= (std::bit_cast<Bits>(data[i]) & kExponent) + (kExponent & -kExponent);
    }
    if (found >> (sizeof(T) * 8 - 1)) finite = false;
  });
  return finite;
}

}  // namespace

template <typename T>
void convolution_weight_grad(const KernelTable& table, const Parallel& parallel, const ConvGeometry& geometry,
                             const ImageView<const T>& output, const PackedView<T>& input, T* grad_weight,
                             bool channels_last) {
  ConvGeometry g = geometry;
  ImageView<const T> grad_output = output;
  join_pixels(g, grad_output);
  if (g.stride_height > kMostTapClasses / g.stride_width) {
    throw std::invalid_argument("stride: the weight gradient takes strides whose product is at most " +
                                std::to_string(kMostTapClasses) + ", got [" + std::to_string(g.stride_height) + ", " +
                                std::to_string(g.stride_width) + "]");
  }
  const int64_t weights = g.out_channels * g.group_in() * g.taps();
  if (input.numel == 0) {
    std::fill_n(grad_weight, weights, T{0});
    return;
  }
  const int64_t kept_count = kept_elements(input.words, input.ranks, input.numel);
  const Kernels<T>& kernels = table.of<T>();
  const int64_t lanes = kernels.lanes;
  if (suits_depthwise(g, lanes)) {
    // It multiplies the zeros of dropped activations too, which shows where a factor is not finite: lists then do it again.
    depthwise_weight_grad(table, parallel, g, grad_output, input, grad_weight, channels_last);
    if (all_finite(parallel, grad_weight, weights) && all_finite(parallel, input.values, kept_count)) return;
  }
  const double kept = static_cast<double>(kept_count);
  const WeightGradPlan plan =
      plan_weight_grad(g, sizeof(T), lanes, table.weight_grad_vectors, kept / static_cast<double>(input.numel));
  const int64_t width = plan.vectors * lanes;
  const int64_t slice_elements = g.groups * ((g.group_out() + width - 1) / width) * g.group_in() * g.taps() * width;
  Buffer<T> partial(plan.direct ? 0 : plan.slices * slice_elements);

  std::vector<TapKernel<T>> tap_kernels;
  for (const TapRun& run : plan.runs) tap_kernels.push_back(kernels.tap_kernel(run, plan.vectors));

  WeightGradParams<T> params;
  params.input = input;
  params.grad_output = grad_output;
  params.geometry = g;
  params.tile_samples = plan.tile_samples;
  params.tile_rows = plan.tile_rows;
  params.tile_columns = plan.tile_columns;
  params.tiles_n = plan.tiles_n;
  params.tiles_h = plan.tiles_h;
  params.tiles_w = plan.tiles_w;
  params.origin_row = plan.origin_row;
  params.origin_column = plan.origin_column;
  params.grad_rows = plan.grad_rows;
  params.grad_columns = plan.grad_columns;
  params.pixel = plan.pixel.data();
  params.pixel_class = plan.pixel_class.data();
  params.runs = plan.runs.data();
  params.kernels = tap_kernels.data();
  params.classes = plan.classes.data();
  params.class_count = plan.classes.size();
  params.vectors = plan.vectors;
  params.batch_tiles = plan.batch_tiles;
  params.listed_tiles = plan.listed_tiles;
  params.blocks_together = plan.blocks_together;
  params.slices = plan.slices;
  params.partial = plan.direct ? nullptr : partial.data();
  params.grad_weight = grad_weight;
  params.channels_last = channels_last;

  // Where slices are fewer than threads, threads share a slice by input channels: every sum still has one owner and one order.
  const int64_t parts = std::min(g.in_channels, (parallel.threads + plan.slices - 1) / plan.slices);
  parallel(partial.capacity(), 1 << 16,
           [&](int64_t begin, int64_t end) { std::fill(params.partial + begin, params.partial + end, T{0}); });
  parallel(plan.slices * parts, 1, [&](int64_t begin, int64_t end) {
    WeightGradScratch<T> scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      kernels.weight_grad_slice(params, task / parts, g.in_channels * part / parts, g.in_channels * (part + 1) / parts,
                                scratch);
    }
  });
  if (plan.direct) return;
  parallel(g.in_channels, 1, [&](int64_t begin, int64_t end) { kernels.weight_grad_reduce(params, begin, end); });
}

template void convolution_weight_grad(const KernelTable&, const Parallel&, const ConvGeometry&,
                                      const ImageView<const float>&, const PackedView<float>&, float*, bool);
template void convolution_weight_grad(const KernelTable&, const Parallel&, const ConvGeometry&,
                                      const ImageView<const double>&, const PackedView<double>&, double*, bool);

}  // namespace swat::cpu
