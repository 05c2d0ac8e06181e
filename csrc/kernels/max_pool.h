// Max pooling, as the kernels of every device see it.
#pragma once

#include <cstdint>

namespace swat {

inline constexpr int64_t kMostTaps = 256;  // of a window: the position of its maximum is a byte

// [batch, channels, height, width], in memory as the input lies: `channels_last` or contiguous.
struct MaxPoolShape {
  int64_t batch, channels, height, width;
  int64_t out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_height, pad_width;
  int64_t dilation_height, dilation_width;
  bool channels_last;
};

}  // namespace swat
