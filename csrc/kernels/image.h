// Images and convolutions, as the kernels of every device see them. Strides count elements.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace swat {

// A dense [N, C, H, W] tensor with any strides.
template <typename T>
struct ImageView {
  T* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  SWAT_HOST_DEVICE int64_t numel() const { return batch * channels * height * width; }
};

// Whether the rows of an image lie evenly one after the other, so that they may be seen as one.
template <typename T>
bool rows_join(const ImageView<T>& image) {
  return image.row_stride == image.width * image.column_stride;
}
template <typename T>
void join_rows(ImageView<T>& image) {
  image.width *= image.height;
  image.height = 1;
  image.row_stride = image.width * image.column_stride;
}

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

}  // namespace swat
