// How a tensor lies in memory, as far as packing kernels care.
#pragma once

#include "params.h"

namespace swat::cuda {

enum class Layout {
  contiguous,     // memory order is logical order
  channels_last,  // channels one after the other, pixels evenly apart
  strided,        // anything else
};

template <typename T>
inline int64_t pixel_stride(const ImageView<T>& image) {
  return image.width == 1 ? image.row_stride : image.column_stride;
}

// Strides of axes of size 1 mean nothing.
template <typename T>
inline Layout layout_of(const ImageView<T>& image) {
  const int64_t sizes[] = {image.batch, image.channels, image.height, image.width};
  const int64_t strides[] = {image.batch_stride, image.channel_stride, image.row_stride, image.column_stride};
  int64_t expected = 1;
  bool contiguous = true;
  for (int axis = 3; axis >= 0; --axis) {
    contiguous = contiguous && (sizes[axis] == 1 || strides[axis] == expected);
    expected *= sizes[axis];
  }
  if (contiguous) return Layout::contiguous;
  const bool joined = image.height == 1 || image.width == 1 || image.row_stride == image.width * image.column_stride;
  return joined && image.channel_stride == 1 ? Layout::channels_last : Layout::strided;
}

// Where logical element `index` lies.
template <typename T>
SWAT_HOST_DEVICE inline int64_t offset_of(const ImageView<T>& image, int64_t index) {
  const int64_t column = index % image.width;
  index /= image.width;
  const int64_t row = index % image.height;
  index /= image.height;
  return index / image.channels * image.batch_stride + index % image.channels * image.channel_stride +
         row * image.row_stride + column * image.column_stride;
}

}  // namespace swat::cuda
