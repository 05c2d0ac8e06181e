// Parameters of the CPU kernels: raw pointers, sizes and strides, one structure a primitive. Strides count elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../image.h"

namespace swat::cpu {

// a / b rounded up, for a >= 0 and b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Packed tensors ---------------------------------------------------------------------------------------------------------

inline constexpr int64_t kBlockBits = 1024;  // elements between two entries of the rank directory

// A packed tensor: kept elements in logical row-major order, and for every element one bit.
template <typename T>
struct PackedView {
  const T* values;
  const uint64_t* words;  // [ceil(numel / 64)] bitmap, lowest bit first
  const int64_t* ranks;   // [ceil(numel / 1024)] kept elements before each 1024
  int64_t numel;
};

// A place in a packed tensor: an element, and the value of the first kept one from there on.
template <typename T>
struct PackedCursor {
  int64_t position = 0;
  const T* value = nullptr;
};

// Elements that compressing a plane takes beside its own: planes a power of two apart would share one set of the cache.
inline constexpr int64_t kPlaneSpare = 16;

// A tensor to compress or restore, seen as planes of `pixels` elements: plane i is [i / channels, i % channels].
template <typename T>
struct PlanesView {
  T* data;
  int64_t channels, pixels;
  int64_t numel;  // the last plane may be short where the tensor is one contiguous run cut in planes
  int64_t outer_stride, channel_stride, pixel_stride;
  int64_t first = 0;  // where a part of a packed tensor begins in it, in elements; for decompress alone
};

// ---- Selection --------------------------------------------------------------------------------------------------------------

inline constexpr int kMagnitudeDigitBits = 11;
inline constexpr int kMagnitudeDigits = 1 << kMagnitudeDigitBits;

// ---- Convolution ------------------------------------------------------------------------------------------------------------

using swat::ConvGeometry;
using swat::ImageView;

// One non-zero weight as the gather kernel walks it.
template <typename T>
struct GatherEntry;
template <>
struct GatherEntry<float> {
  float weight;
  int32_t offset;  // bytes from the tile's start to the first pixel that this weight multiplies
};
template <>
struct GatherEntry<double> {
  double weight;
  int64_t offset;
};

// Input channels that are packed and used together, and the output rows that read them.
struct ChannelBlock {
  int64_t channel_begin, channel_end;
  int64_t row_begin, row_end;
  int64_t list;  // index into the list starts of row_begin's list
  bool first;    // the first block of its rows: they start from the bias
};

// How the rows of a sparse weight become lists over channel blocks.
//
// The gather kernel computes rows from channels: output channels from input channels in the forward pass, the reverse in the input
// gradient. "Element" is a position in one group's slice of the weight: (input channel of the group) * taps + tap.
template <typename T>
struct WeightListParams {
  PackedView<T> weight;
  int64_t group_in, group_out, taps;
  const int32_t*
      element_offset;  // [group_in * taps] bytes in the tile, relative to the block; kAbsent: not part of this pass
  const int32_t* element_row;  // [group_in * taps] input channel of the group (input gradient only)
  int64_t channel_bytes;       // bytes between two channels of the tile
  const ChannelBlock* blocks;
  int64_t blocks_per_group, groups_per_block, block_channels;
  int64_t* starts;  // counts of each list, then its start
  GatherEntry<T>* entries;

  static constexpr int32_t kAbsent = INT32_MIN;
};

// Weights of a run: neighbours along the width of a kernel that is kept as a whole.
inline constexpr int64_t kRunWeights = 3;

// Most channels of a block.
inline constexpr int64_t kMostBlockChannels = 256;

// Shape of the output pixels that stay in registers, [height, width].
struct RegisterTile {
  int height, width;
};

// output[n, r, i, j] = bias[r] + sum over r's entries of weight * input[n, c, i * step_h + row, j * step_w + column].
//
// A lane of the vectors is one output tile of one sample. Tiles are numbered with the sample fastest, so that lanes are samples
// where there are enough of them, and tiles of the same sample where there are not.
template <typename T>
struct GatherParams {
  ImageView<const T> input;
  ImageView<T> output;  // [N, rows, grid height, grid width]
  int64_t step_h, step_w;
  const T* bias;                // [rows] or null
  const int64_t* tile_rows;     // [packed_height] input row of each packed row, relative to the tile
  const int64_t* tile_columns;  // [packed_width]
  int64_t packed_height, packed_width;
  int shape;  // index into the register tiles of the instruction set
  int64_t tile_height, tile_width;
  const ChannelBlock* blocks;
  int64_t block_count, block_channels;
  const int64_t* starts;
  const GatherEntry<T>* entries;
  // 0; or 1 or -1, where every list is runs of kRunWeights entries whose pixels lie side by side, ascending or descending.
  int run;
  int64_t row_chunk;  // rows of output computed in one pass over the channels

  // Tiles of one sample.
  int64_t tiles_h() const { return ceil_div(output.height, tile_height); }
  int64_t tiles_w() const { return ceil_div(output.width, tile_width); }
  int64_t row_chunks() const { return ceil_div(output.channels, row_chunk); }
};

// dW[o, c, t] = sum over the kept x[n, c, h, w] of x * dy[n, o, ...]: the pixels of one channel share a list, and the vectors run
// over output channels, so where an activation lies never matters to them.

// Up to 3 x 3 taps that one walk over a list serves.
struct TapRun {
  int32_t rows, columns;
  int32_t tap, tap_row_step,
      tap_column_step;  // index into [kernel_height, kernel_width] of the first tap; from one to the next
  int32_t pixel, row_step, column_step;  // pixels of the dy tile from an entry's position to the first tap's; likewise
};

// Adds one list of activations to the gradients of a run's taps: out[tap][vectors * lanes] += value * dy.
template <typename T>
using TapKernel = void (*)(const T* grad, const GatherEntry<T>* entry, const GatherEntry<T>* end, const TapRun& run,
                           T* out);

// Classes that a pixel's 16 bits can name.
inline constexpr int64_t kMostTapClasses = 1 << 16;

// Activations whose coordinates agree modulo the stride meet the same taps: runs [begin, end).
struct TapClass {
  int32_t run_begin, run_end;
};

template <typename T>
struct WeightGradParams {
  PackedView<T> input;  // [N, C, H, W]
  ImageView<const T> grad_output;
  ConvGeometry geometry;
  // A tile covers [tile_samples, tile_rows * stride_height, tile_columns * stride_width] of the input.
  int64_t tile_samples, tile_rows, tile_columns;
  int64_t tiles_n, tiles_h, tiles_w;
  int64_t origin_row, origin_column;  // first dy pixel that tile (0, 0) meets
  int64_t grad_rows, grad_columns;    // dy pixels that one sample of a tile meets
  const int32_t* pixel;         // [tile_rows * stride_height, tile_columns * stride_width] position in the dy tile
  const uint16_t* pixel_class;  // the same, class of the pixel
  const TapRun* runs;
  const TapKernel<T>* kernels;  // of each run
  const TapClass* classes;
  int64_t class_count;
  int64_t vectors;          // output channels of one pass, in vectors: 1, 2, 4 or 8
  int64_t batch_tiles;      // tiles whose dy is packed together
  int64_t listed_tiles;     // tiles whose activations are listed together: a multiple of batch_tiles
  int64_t blocks_together;  // blocks of `vectors` output channels whose dy is packed together
  int64_t slices;           // parts of the tiles that are summed apart, so that threads can share a small dW
  T* partial;      // [slices, groups, output blocks, group_in, taps, vectors * lanes]; null: one batch holds all tiles
  T* grad_weight;  // [out_channels, group_in, taps], or [out_channels, taps, group_in]:
  bool channels_last;

  int64_t tiles() const { return tiles_n * tiles_h * tiles_w; }
};

// The same for groups of few output channels (depthwise_grad.inl).
template <typename T>
struct DepthwiseParams {
  PackedView<T> input;  // [N, C, H, W]
  ImageView<const T> grad_output;
  ConvGeometry geometry;
  int64_t tile_rows, tile_columns;  // output pixels
  int64_t tiles_h, tiles_w;
  int64_t patch_rows, patch_columns;  // input pixels
  const int32_t* pixel;  // [patch_rows, in_width] where a pixel lies in the patch, in elements, from that of the first
  int64_t slices;        // parts of the tiles that are summed apart
  T* partial;            // [slices, blocks of output channels, group_in, taps, lanes]
  T* grad_weight;        // [out_channels, group_in, taps], or [out_channels, taps, group_in]:
  bool channels_last;

  int64_t tiles() const { return geometry.batch * tiles_h * tiles_w; }
};

}  // namespace swat::cpu
