// The kernels of one instruction set, as function pointers: what the drivers, the tests and the benches call.
#pragma once

#include <vector>

#include "buffer.h"
#include "layer_params.h"
#include "params.h"

namespace swat::cpu {

// Scratch of one thread in the weight gradient.
template <typename T>
struct WeightGradScratch {
  Buffer<T> grad;                        // [block][tile][sample][row][column][vectors * lanes]
  Buffer<T> sums;                        // [channel][tap][vectors * lanes], where they do not go to `partial`
  Buffer<GatherEntry<T>> entries;        // lists of a batch of tiles
  Buffer<GatherEntry<T>> unsorted;       // one list before it is split by class
  Buffer<uint16_t> classes;              // of those
  Buffer<int64_t> starts;                // [tile][channel][class] + 1
  std::vector<PackedCursor<T>> cursors;  // of each channel
  std::vector<int64_t> next;             // where each channel's, or each class's, list goes on
};

// Each works on a range [begin, end) of what it is said to count; the bodies' files say the rest.
template <typename T>
struct Kernels {
  int lanes;

  // magnitude.inl: elements
  void (*magnitude_histogram)(const T* data, int64_t begin, int64_t end, uint64_t prefix, int shift, int64_t* counts);

  // compress.inl: planes; blocks of the rank directory; the same; planes; planes; samples
  int64_t (*compress_scratch)(const PlanesView<const T>& view);
  int64_t (*compress_planes)(const PlanesView<const T>& view, T threshold, int64_t begin, int64_t end, uint64_t* words,
                             T* scratch, T* out);
  void (*count_blocks)(const uint64_t* words, int64_t numel, int64_t begin, int64_t end, int64_t* counts);
  bool (*ranks_agree)(const uint64_t* words, const int64_t* ranks, int64_t numel, int64_t begin, int64_t end);
  void (*decompress_planes)(const PackedView<T>& packed, const PlanesView<T>& view, int64_t begin, int64_t end);
  void (*take_planes)(const PackedView<T>& packed, const PlanesView<const T>& view, int64_t begin, int64_t end,
                      T* values);
  void (*take_samples)(const PackedView<T>& packed, const PlanesView<const T>& view, const int32_t* offsets,
                       int64_t begin, int64_t end, T* values);

  // weight_list.inl: output channels; channel blocks
  void (*count_forward_lists)(const WeightListParams<T>& params, int64_t begin, int64_t end);
  void (*fill_forward_lists)(const WeightListParams<T>& params, int64_t begin, int64_t end);
  void (*count_backward_lists)(const WeightListParams<T>& params, int64_t begin, int64_t end);
  void (*fill_backward_lists)(const WeightListParams<T>& params, int64_t begin, int64_t end);

  // gather_conv.inl: lists; tasks
  bool (*are_runs)(const GatherEntry<T>* entries, const int64_t* starts, int64_t begin, int64_t end, int64_t step);
  int64_t (*gather_tasks)(const GatherParams<T>& params);
  int64_t (*gather_scratch)(const GatherParams<T>& params);
  void (*gather_tiles)(const GatherParams<T>& params, int64_t begin, int64_t end, T* scratch);

  // weight_grad.inl: a run and the vectors of one pass; one slice and a range of input channels; input channels
  TapKernel<T> (*tap_kernel)(const TapRun& run, int64_t vectors);
  void (*weight_grad_slice)(const WeightGradParams<T>& params, int64_t slice, int64_t begin, int64_t end,
                            WeightGradScratch<T>& scratch);
  void (*weight_grad_reduce)(const WeightGradParams<T>& params, int64_t begin, int64_t end);

  // depthwise_grad.inl: one slice and a range of blocks of output channels; those blocks
  int64_t (*depthwise_scratch)(const DepthwiseParams<T>& params);
  void (*depthwise_slice)(const DepthwiseParams<T>& params, int64_t slice, int64_t begin, int64_t end, T* scratch);
  void (*depthwise_reduce)(const DepthwiseParams<T>& params, int64_t begin, int64_t end);

  // bias_grad.inl: parts of so many pixels; channels
  void (*sum_parts)(const ImageView<const T>& image, int64_t part, int64_t begin, int64_t end, T* sums);
  void (*add_parts)(const T* sums, int64_t parts, int64_t channels, int64_t begin, int64_t end, T* result);

  // relu.inl: words of 64 elements
  void (*relu_words)(const T* input, int64_t numel, int64_t begin, int64_t end, T* output, uint64_t* words);
  void (*mask_words)(const T* input, const uint64_t* words, int64_t numel, int64_t begin, int64_t end, T* output);

  // batch_norm.inl: tasks of the sums, blocks of the elements
  int64_t (*batch_norm_scratch)(const BatchNormShape& shape);
  void (*batch_norm_statistics)(const BatchNormParams<T>& params, int64_t begin, int64_t end);
  void (*batch_norm_normalise)(const BatchNormParams<T>& params, int64_t begin, int64_t end);
  void (*batch_norm_sums)(const BatchNormParams<T>& params, int64_t begin, int64_t end, T* scratch);
  void (*batch_norm_input_grad)(const BatchNormParams<T>& params, int64_t begin, int64_t end, T* scratch);

  // max_pool.inl: rows of the output; rows of the input, or planes if contiguous
  void (*max_pool_rows)(const MaxPoolShape& shape, const T* input, int64_t begin, int64_t end, T* output,
                        uint8_t* positions);
  void (*max_pool_input_grad)(const MaxPoolShape& shape, const T* grad_output, const uint8_t* positions, int64_t begin,
                              int64_t end, T* grad_input);
};

struct KernelTable {
  int64_t vector_bytes;
  const RegisterTile* register_tiles;
  int register_tile_count;
  int64_t (*weight_grad_vectors)(int64_t taps);
  Kernels<float> float32;
  Kernels<double> float64;

  template <typename T>
  const Kernels<T>& of() const {
    if constexpr (sizeof(T) == 4) {
      return float32;
    } else {
      return float64;
    }
  }
};

}  // namespace swat::cpu
