// All kernels of one instruction set and their table. The including file sets the target, SWAT_VECTOR_BYTES and SWAT_INTRINSICS,
// and opens a namespace of the set's own, so that no two sets share a symbol.

#include "vec.inl"
//
#include "bitmap.inl"
#include "lanes.inl"
//
#include "activation_lists.inl"
//
#include "bias_grad.inl"
#include "compress.inl"
#include "gather_conv.inl"
#include "magnitude.inl"
#include "relu.inl"
#include "weight_grad.inl"
#include "weight_list.inl"
//
#include "depthwise_grad.inl"
//
#include "batch_norm.inl"
#include "max_pool.inl"

template <typename T>
constexpr Kernels<T> kernels_of() {
  return {
      .lanes = kLanes<T>,
      .magnitude_histogram = magnitude_histogram<T>,
      .compress_scratch = compress_scratch<T>,
      .compress_planes = compress_planes<T>,
      .count_blocks = count_blocks,
      .ranks_agree = ranks_agree,
      .decompress_planes = decompress_planes<T>,
      .take_planes = take_planes<T>,
      .take_samples = take_samples<T>,
      .count_forward_lists = count_forward_lists<T>,
      .fill_forward_lists = fill_forward_lists<T>,
      .count_backward_lists = count_backward_lists<T>,
      .fill_backward_lists = fill_backward_lists<T>,
      .are_runs = are_runs<T>,
      .gather_tasks = gather_tasks<T>,
      .gather_scratch = gather_scratch<T>,
      .gather_tiles = gather_tiles<T>,
      .tap_kernel = tap_kernel<T>,
      .weight_grad_slice = weight_grad_slice<T>,
      .weight_grad_reduce = weight_grad_reduce<T>,
      .depthwise_scratch = depthwise_scratch<T>,
      .depthwise_slice = depthwise_slice<T>,
      .depthwise_reduce = depthwise_reduce<T>,
      .sum_parts = sum_parts<T>,
      .add_parts = add_parts<T>,
      .relu_words = relu_words<T>,
      .mask_words = mask_words<T>,
      .batch_norm_scratch = batch_norm_scratch<T>,
      .batch_norm_statistics = batch_norm_statistics<T>,
      .batch_norm_normalise = batch_norm_normalise<T>,
      .batch_norm_sums = batch_norm_sums<T>,
      .batch_norm_input_grad = batch_norm_input_grad<T>,
      .max_pool_rows = max_pool_rows<T>,
      .max_pool_input_grad = max_pool_input_grad<T>,
  };
}

constexpr KernelTable table_of() {
  return {
      .vector_bytes = kVectorBytes,
      .register_tiles = kRegisterTiles,
      .register_tile_count = static_cast<int>(std::size(kRegisterTiles)),
      .weight_grad_vectors = weight_grad_vectors,
      .float32 = kernels_of<float>(),
      .float64 = kernels_of<double>(),
  };
}
