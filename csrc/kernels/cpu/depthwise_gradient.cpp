#include "depthwise_gradient.h"

#include <algorithm>
#include <vector>

#include "weight_grad_plan.h"

namespace swat::cpu {
namespace {

constexpr int64_t kMostGroupOut = 4;       // beyond, vectors of one group's output channels do well
constexpr int64_t kMostPairs = 8;          // (input, output) channels of a group: more amortise the packing of its dy
constexpr int64_t kPatchBytes = 40 << 10;  // activations of a tile as [pixel][lane], about L1
constexpr int64_t kLeastColumns = 8;       // of a tile
constexpr int64_t kMostExtent = 1 << 12;   // input pixels under one dilated kernel: what a patch holds at least

int64_t extent_height(const ConvGeometry& g) { return (g.kernel_height - 1) * g.dilation_height + 1; }
int64_t extent_width(const ConvGeometry& g) { return (g.kernel_width - 1) * g.dilation_width + 1; }

// Tiles: whole rows if they fit, then as many rows as fit. Like slices they depend on the geometry and the vectors' width alone.
template <typename T>
void plan_tiles(int64_t lanes, DepthwiseParams<T>& p) {
  const ConvGeometry& g = p.geometry;
  const int64_t pixels = kPatchBytes / (lanes * static_cast<int64_t>(sizeof(T)));
  const int64_t height = extent_height(g), width = extent_width(g);
  // Whole rows of the image have to fit in whole rows of the patch, read or not.
  p.tile_columns = g.out_width;
  p.patch_columns = std::max((g.out_width - 1) * g.stride_width + width, g.pad_left + g.in_width);
  if (p.patch_columns * height > pixels) {
    const int64_t fitting = (pixels / height - width) / g.stride_width + 1;
    const int64_t columns = even_cut(g.out_width, std::max(fitting, kLeastColumns));
    if (columns < g.out_width) {
      p.tile_columns = columns;
      p.patch_columns = (columns - 1) * g.stride_width + width;
    }
  }
  p.tile_rows = even_cut(g.out_height, (pixels / p.patch_columns - height) / g.stride_height + 1);
  p.patch_rows = (p.tile_rows - 1) * g.stride_height + height;
  p.tiles_h = ceil_div(g.out_height, p.tile_rows);
  p.tiles_w = ceil_div(g.out_width, p.tile_columns);
}

}  // namespace

bool suits_depthwise(const ConvGeometry& g, int64_t lanes) {
  // What lies around the image is packed too: little of it.
  const int64_t read = (g.out_width - 1) * g.stride_width + extent_width(g);
  return g.pad_left <= kMostExtent && read <= g.pad_left + g.in_width + kMostExtent && g.group_out() <= kMostGroupOut &&
         g.group_in() * g.group_out() <= kMostPairs && g.out_channels >= lanes / 2 &&
         extent_height(g) * extent_width(g) <= kMostExtent;
}

template <typename T>
void depthwise_weight_grad(const KernelTable& table, const Parallel& parallel, const ConvGeometry& g,
                           const ImageView<const T>& grad_output, const PackedView<T>& input, T* grad_weight,
                           bool channels_last) {
  const Kernels<T>& kernels = table.of<T>();
  DepthwiseParams<T> params;
  params.input = input;
  params.grad_output = grad_output;
  params.geometry = g;
  params.grad_weight = grad_weight;
  params.channels_last = channels_last;
  plan_tiles(kernels.lanes, params);
  std::vector<int32_t> pixel(params.patch_rows * g.in_width);
  for (int64_t i = 0; i < static_cast<int64_t>(pixel.size()); ++i) {
    pixel[i] = static_cast<int32_t>((i / g.in_width * params.patch_columns + i % g.in_width) * kernels.lanes);
  }
  params.pixel = pixel.data();

  const int64_t blocks = ceil_div(g.out_channels, kernels.lanes);
  const int64_t slice_elements = blocks * g.group_in() * g.taps() * kernels.lanes;
  params.slices = fitting_slices(params.tiles(), slice_elements);
  Buffer<T> partial(params.slices * slice_elements);
  std::fill_n(partial.data(), params.slices * slice_elements, T{0});
  params.partial = partial.data();

  // Where slices are fewer than threads, threads share a slice by blocks.
  const int64_t parts = std::min(blocks, ceil_div(parallel.threads, params.slices));
  parallel(params.slices * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(kernels.depthwise_scratch(params));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      kernels.depthwise_slice(params, task / parts, blocks * part / parts, blocks * (part + 1) / parts, scratch.data());
    }
  });
  parallel(blocks, 16, [&](int64_t begin, int64_t end) { kernels.depthwise_reduce(params, begin, end); });
}

template void depthwise_weight_grad(const KernelTable&, const Parallel&, const ConvGeometry&,
                                    const ImageView<const float>&, const PackedView<float>&, float*, bool);
template void depthwise_weight_grad(const KernelTable&, const Parallel&, const ConvGeometry&,
                                    const ImageView<const double>&, const PackedView<double>&, double*, bool);

}  // namespace swat::cpu
