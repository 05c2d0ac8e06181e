// Parameters of the CUDA kernels: device pointers, sizes and strides. Strides count elements. Scratch is the caller's memory, as
// much as the launcher's *_scratch function says, whatever it holds; a launcher leaves nothing behind in it.
#pragma once

#include "types.h"

namespace swat::cuda {

// A packed tensor on the device: kept elements in logical row-major order, and for every element one bit. `values` may be longer
// than what the bitmap counts.
template <typename T>
struct PackedView {
  const T* values;
  const uint64_t* words;  // [ceil(numel / 64)]
  const int64_t* ranks;   // [ceil(numel / 1024)]
  int64_t numel;
  int64_t capacity;  // elements of `values`
};

// A dense [N, C, H, W] tensor with any strides; fewer dimensions have leading ones.
template <typename T>
struct ImageView {
  T* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  SWAT_HOST_DEVICE int64_t numel() const { return batch * channels * height * width; }
};

template <typename T>
struct MagnitudeParams {
  const T* data;
  int64_t count;  // below 2^32
  int64_t k;      // 1 <= k <= count
  T* result;
  void* scratch;
  const int32_t* condition;  // run only where this is not 0; null: always
};

template <typename T>
struct CompressParams {
  ImageView<const T> input;
  const T* threshold;
  uint64_t* words;
  int64_t* ranks;
  int64_t* kept;  // one number: how many elements are kept
  T* values;
  int64_t capacity;  // elements of `values`; 0: the mask alone
  void* scratch;
  const int32_t* condition;  // run only where this is not 0; null: always
};

template <typename T>
struct DecompressParams {
  PackedView<T> packed;
  ImageView<T> output;
};

// A convolution's geometry: what nn.Conv2d takes, with the leading padding of each axis (the output size implies the trailing).
struct ConvGeometry {
  int64_t batch, groups;
  int64_t in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t dilation_height, dilation_width;
  int64_t pad_top, pad_left;

  SWAT_HOST_DEVICE int64_t taps() const { return kernel_height * kernel_width; }
  SWAT_HOST_DEVICE int64_t group_in() const { return in_channels / groups; }
  SWAT_HOST_DEVICE int64_t group_out() const { return out_channels / groups; }
};

template <typename T>
struct ConvolutionParams {
  ConvGeometry geometry;
  ImageView<const T> input;
  PackedView<T> weight;
  const T* bias;  // [out_channels] or null
  ImageView<T> output;
  void* scratch;
};

template <typename T>
struct InputGradParams {
  ConvGeometry geometry;
  ImageView<const T> grad_output;
  PackedView<T> weight;
  ImageView<T> grad_input;
  void* scratch;
};

template <typename T>
struct WeightGradParams {
  ConvGeometry geometry;
  ImageView<const T> grad_output;
  PackedView<T> input;  // [N, C, H, W]
  T* grad_weight;       // [out_channels, group_in, taps]
  bool allow_tf32;      // float may be rounded to tf32 and multiplied on tensor cores
  void* scratch;
};

}  // namespace swat::cuda
