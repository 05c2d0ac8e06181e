// Parameters of the CUDA kernels: device pointers, sizes and strides. Strides count elements. Scratch is the caller's memory, as
// much as the launcher's *_scratch function says, whatever it holds; a launcher leaves nothing behind in it.
#pragma once

#include "../image.h"
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

using swat::ConvGeometry;
using swat::ImageView;  // fewer dimensions have leading ones

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
  int64_t begin;  // the packed element that is the first of the output
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
  ImageView<T> grad_input;  // dense in memory
  void* scratch;
};

}  // namespace swat::cuda
