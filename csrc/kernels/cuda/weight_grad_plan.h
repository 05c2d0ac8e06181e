// How the weight gradient is cut: dW as a product of dy [output channels, pixels] and the expanded input [pixels, (channel, tap)].
#pragma once

#include "params.h"

namespace swat::cuda {

inline constexpr int kGradRows = 64;     // output channels of a block
inline constexpr int kGradColumns = 64;  // (channel, tap) pairs of a block
inline constexpr int kGradThreads = 128;
inline constexpr int64_t kGradPatchBytes = 28 << 10;
inline constexpr int64_t kGradPartialBytes = 64 << 20;  // most memory for sums that are yet to be added up
inline constexpr int64_t kGradBlocks = 1024;  // about this many blocks fill any GPU; the same on all, so that sums are

struct WeightGradPlan {
  int64_t tile_samples, tile_height, tile_width;  // output pixels in shared memory together
  int64_t tiles_n, tiles_h, tiles_w;
  int64_t patch_height, patch_width;
  int64_t patch;  // elements from one channel of a tile's input to the next
  int64_t row_blocks, column_blocks;
  int64_t slices;  // parts of the tiles that are summed apart
  bool direct;     // no tile fits
  SWAT_HOST_DEVICE int64_t tiles() const { return tiles_n * tiles_h * tiles_w; }
};

// Most channels that kGradColumns neighbouring columns, from a multiple of kGradColumns on, belong to.
inline int64_t grad_channels(const ConvGeometry& g) {
  const int64_t most = kGradColumns % g.taps() == 0 ? kGradColumns / g.taps() : (kGradColumns - 1) / g.taps() + 2;
  return most < g.group_in() ? most : g.group_in();
}

// `pixels`: output pixels of a tile. `element_bytes`: of an expanded input element.
inline WeightGradPlan plan_weight_grad(const ConvGeometry& g, int64_t pixels, int64_t element_bytes) {
  WeightGradPlan best{};
  best.direct = true;
  best.slices = 1;
  int64_t least = 0;
  const int64_t channels = grad_channels(g), room = kGradPatchBytes / element_bytes / channels;
  for (int64_t pieces_w = ceil_div(g.out_width, pixels); pieces_w <= g.out_width; ++pieces_w) {
    const int64_t width = ceil_div(g.out_width, pieces_w);
    if (pieces_w > 1 && width == ceil_div(g.out_width, pieces_w - 1)) continue;
    for (int64_t pieces_h = ceil_div(g.out_height, pixels / width); pieces_h <= g.out_height; ++pieces_h) {
      const int64_t height = ceil_div(g.out_height, pieces_h);
      if (pieces_h > 1 && height == ceil_div(g.out_height, pieces_h - 1)) continue;
      WeightGradPlan plan{};
      plan.patch_height = (height - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height + 1;
      plan.patch_width = (width - 1) * g.stride_width + (g.kernel_width - 1) * g.dilation_width + 1;
      const int64_t area = plan.patch_height * plan.patch_width;
      if (area > room - 1) continue;
      int64_t samples = pixels / (width * height);
      if (samples > g.batch) samples = g.batch;
      if (samples > (room - 1) / area) samples = (room - 1) / area;
      plan.patch = samples * area | 1;  // odd, so that neighbouring channels start in different banks
      plan.tile_samples = samples;
      plan.tile_height = height;
      plan.tile_width = width;
      plan.tiles_n = ceil_div(g.batch, samples);
      plan.tiles_h = ceil_div(g.out_height, height);
      plan.tiles_w = ceil_div(g.out_width, width);
      const int64_t cost = plan.tiles() * (16 * pixels + channels * plan.patch);
      if (best.direct || cost < least) {
        best = plan;
        least = cost;
      }
    }
  }
  best.row_blocks = ceil_div(g.group_out(), kGradRows);
  best.column_blocks = ceil_div(g.group_in() * g.taps(), kGradColumns);
  if (!best.direct) {
    const int64_t blocks = g.groups * best.row_blocks * best.column_blocks;
    const int64_t bytes = g.out_channels * g.group_in() * g.taps() * (element_bytes == 8 ? 8 : 4);
    best.slices = kGradBlocks / blocks;
    if (best.slices > kGradPartialBytes / bytes) best.slices = kGradPartialBytes / bytes;
    if (best.slices > best.tiles()) best.slices = best.tiles();
    if (best.slices < 1) best.slices = 1;
  }
  return best;
}

}  // namespace swat::cuda
