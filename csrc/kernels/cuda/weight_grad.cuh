// What both kernels of the weight gradient share: where a block works, and its tiles in shared memory.
#pragma once

#include "expand.cuh"
#include "weight_grad_plan.h"

namespace swat::cuda {

// Where the gradients of one output channel's weights lie; a column is a pair (channel, tap).
struct GradLayout {
  int group_in, taps;
  bool channels_last;
  __device__ int64_t place(int64_t row, int column) const {
    const int at = channels_last ? column % taps * group_in + column / taps : column;
    return row * group_in * taps + at;
  }
};

inline GradLayout grad_layout(const ConvGeometry& g, bool channels_last) {
  return {static_cast<int>(g.group_in()), static_cast<int>(g.taps()), channels_last};
}

// S is the type in shared memory.
template <typename T, typename S>
struct GradParams {
  ConvGeometry geometry;
  WeightGradPlan plan;
  ImageView<const T> grad_output;
  PackedView<T> input;
  T* grad_weight;       // written where there is one slice
  GradLayout layout;    // of grad_weight
  Compute<T>* partial;  // [slices, out_channels, group_in * taps] where there are several
};

// The part of dW that a block computes, and the tiles that it sums over.
struct GradBlock {
  int group, first_row, first_column;
  int first_channel, channels;  // of the group, that the columns belong to
  int tile_begin, tile_end;
};

__device__ inline GradBlock grad_block(const ConvGeometry& g, const WeightGradPlan& plan) {
  GradBlock block;
  const uint32_t row_blocks = static_cast<uint32_t>(plan.row_blocks),
                 column_blocks = static_cast<uint32_t>(plan.column_blocks);
  const int taps = static_cast<int>(g.taps()),
            columns = static_cast<int>(g.in_channels) / static_cast<int>(g.groups) * taps;
  block.first_row = static_cast<int>(blockIdx.x % row_blocks) * kGradRows;
  block.first_column = static_cast<int>(blockIdx.x / row_blocks % column_blocks) * kGradColumns;
  block.group = static_cast<int>(blockIdx.x / row_blocks / column_blocks);
  const int last_column =
      (block.first_column + kGradColumns < columns ? block.first_column + kGradColumns : columns) - 1;
  block.first_channel = block.first_column / taps;
  block.channels = last_column / taps - block.first_channel + 1;
  const int tiles = static_cast<int>(plan.tiles()), slices = static_cast<int>(plan.slices);
  const int each = tiles / slices, longer = tiles % slices, slice = static_cast<int>(blockIdx.y);
  block.tile_begin = slice * each + (slice < longer ? slice : longer);
  block.tile_end = block.tile_begin + each + (slice < longer ? 1 : 0);
  return block;
}

// One output pixel of a tile.
struct GradPixel {
  int64_t grad;  // offset into one channel of dy
  int patch;     // of its first tap in one channel of the input tile, or -1: no such pixel
};

// Where column (channel, tap) of the block reads, relative to a pixel.
__device__ inline int column_offset(const ConvGeometry& g, const WeightGradPlan& plan, const GradBlock& block,
                                    int column) {
  const int taps = static_cast<int>(g.taps()), kernel_width = static_cast<int>(g.kernel_width);
  const int at = block.first_column + column, channel = at / taps - block.first_channel, tap = at % taps;
  if (channel >= block.channels) return 0;  // past the end: what is computed there is not written
  return channel * static_cast<int>(plan.patch) +
         tap / kernel_width * static_cast<int>(g.dilation_height) * static_cast<int>(plan.patch_width) +
         tap % kernel_width * static_cast<int>(g.dilation_width);
}

// Fills `pixels` and the input tile for tile number `tile`; convert(value) is what is stored. Barriers are the caller's.
template <typename T, typename S, int kPixels, typename Convert>
__device__ inline void stage_input(const GradParams<T, S>& p, const GradBlock& block, int tile, GradPixel* pixels,
                                   S* patch, Convert convert) {
  const ConvGeometry& g = p.geometry;
  const int tiles_w = static_cast<int>(p.plan.tiles_w), tiles_h = static_cast<int>(p.plan.tiles_h);
  const int height = static_cast<int>(p.plan.tile_height), width = static_cast<int>(p.plan.tile_width);
  const int samples = static_cast<int>(p.plan.tile_samples);
  const int patch_width = static_cast<int>(p.plan.patch_width), patch_height = static_cast<int>(p.plan.patch_height);
  const int left = tile % tiles_w * width, top = tile / tiles_w % tiles_h * height;
  const int sample = tile / tiles_w / tiles_h * samples;

  for (int i = threadIdx.x; i < kPixels; i += kGradThreads) {
    const int x = i % width, y = i / width % height, n = i / width / height;
    const bool exists = n < samples && sample + n < g.batch && top + y < g.out_height && left + x < g.out_width;
    pixels[i].grad = (sample + n) * p.grad_output.batch_stride + (top + y) * p.grad_output.row_stride +
                     (left + x) * p.grad_output.column_stride;
    pixels[i].patch = exists ? n * patch_height * patch_width + y * static_cast<int>(g.stride_height) * patch_width +
                                   x * static_cast<int>(g.stride_width)
                             : -1;
  }

  // A warp expands one row of one channel of one sample.
  const int first_row = top * static_cast<int>(g.stride_height) - static_cast<int>(g.pad_top);
  const int first_column = left * static_cast<int>(g.stride_width) - static_cast<int>(g.pad_left);
  const int begin = first_column < 0 ? -first_column : 0;
  const int in_width = static_cast<int>(g.in_width);
  const int stop = first_column + patch_width < in_width ? patch_width : in_width - first_column;
  for (int run = threadIdx.x / kWarp; run < block.channels * samples * patch_height; run += kGradThreads / kWarp) {
    const int y = run % patch_height, n = run / patch_height % samples, c = run / patch_height / samples;
    S* const to = patch + c * static_cast<int>(p.plan.patch) + (n * patch_height + y) * patch_width;
    const bool inside = sample + n < g.batch && first_row + y >= 0 && first_row + y < g.in_height && begin < stop;
    for (int x = lane_id(); x < patch_width; x += kWarp) {
      if (!inside || x < begin || x >= stop) to[x] = convert(from_bits<T>(0));
    }
    if (inside) {
      const int64_t channel = static_cast<int64_t>(block.group) * g.group_in() + block.first_channel + c;
      const int64_t index =
          (((sample + n) * g.in_channels + channel) * g.in_height + first_row + y) * in_width + first_column;
      expand_run(p.input, index + begin, stop - begin, [&](int i, T value) { to[begin + i] = convert(value); });
    }
  }
}

// put(row, pixel, value) for the block's rows of dy and the tile's pixels; zeros where there is none.
template <typename T, typename S, int kPixels, typename Put>
__device__ inline void stage_grad(const GradParams<T, S>& p, const GradBlock& block, const GradPixel* pixels, Put put) {
  const bool by_channel = p.grad_output.channel_stride == 1 && p.grad_output.column_stride != 1;
  const int rows = static_cast<int>(p.geometry.out_channels) / static_cast<int>(p.geometry.groups) - block.first_row;
  const T* const from =
      p.grad_output.data +
      (static_cast<int64_t>(block.group) * p.geometry.group_out() + block.first_row) * p.grad_output.channel_stride;
#pragma unroll 4
  for (int i = threadIdx.x; i < kGradRows * kPixels; i += kGradThreads) {
    const int row = by_channel ? i % kGradRows : i / kPixels, pixel = by_channel ? i / kGradRows : i % kPixels;
    const bool exists = row < rows && pixels[pixel].patch >= 0;
    put(row, pixel, exists ? from[pixels[pixel].grad + row * p.grad_output.channel_stride] : from_bits<T>(0));
  }
}

// Writes one sum.
template <typename T, typename S>
__device__ inline void put_sum(const GradParams<T, S>& p, const GradBlock& block, int row, int column, Compute<T> sum) {
  const int64_t columns = p.geometry.group_in() * p.geometry.taps();
  if (block.first_row + row >= p.geometry.group_out() || block.first_column + column >= columns) return;
  const int64_t output = block.group * p.geometry.group_out() + block.first_row + row;
  const int at = block.first_column + column;
  if (p.plan.slices == 1) {
    p.grad_weight[p.layout.place(output, at)] = store<T>(sum);
  } else {
    p.partial[(blockIdx.y * p.geometry.out_channels + output) * columns + at] = sum;
  }
}

}  // namespace swat::cuda
