// Parameters of the kernels of the layers around the convolutions. As in params.h, strides and sizes count elements.
#pragma once

#include <cstdint>

namespace swat::cpu {

// In what form a batch normalisation keeps what its backward pass needs of the input.
enum class Saved {
  exact,  // the input itself
  bf16,   // bfloat16 of the normalised value
  int8,  // the normalised value in units of its channel's `scale`, rounded to one of the two nearest integers at random
};

// A dense [N, C, H, W] tensor: `channels_last` is [batch * pixels][channels] in memory, otherwise [batch][channels][pixels].
struct BatchNormShape {
  int64_t batch, channels, pixels;
  bool channels_last;
  // How the work is cut, by the sizes alone, so that results never depend on threads.
  int64_t lines, line;   // lines of `line` elements: the pixels of the batch, or its planes
  int64_t block_lines;   // lines of one block of elements
  int64_t parts, chunk;  // of the sums: parts of the lines (samples, if planes) summed apart; channels of one task

  int64_t numel() const { return batch * channels * pixels; }
  int64_t count() const { return batch * pixels; }
  int64_t blocks() const { return (lines + block_lines - 1) / block_lines; }
  int64_t chunks() const { return (channels + chunk - 1) / chunk; }
  int64_t tasks() const { return parts * chunks(); }
};

// What the passes over memory read and write; each pass says which of these it uses. Arrays are [channels] unless said otherwise.
template <typename T>
struct BatchNormParams {
  BatchNormShape shape;
  Saved saved;
  const T* input;           // null in a backward pass from codes
  const T* grad_output;     // backward
  const void* saved_codes;  // backward

  const double* shift;       // subtracted before summing
  double *sums, *products;   // [parts, channels]: of u, and of u * v
  T *least, *greatest;       // [parts, channels]; null unless int8
  const T* center;           // normalise and input gradient: subtracted first
  const T *factor, *offset;  // output = (input - center) * factor + offset
  const T *code_factor, *code_offset;
  const uint32_t* keys;    // of the random numbers
  const T *slope, *grade;  // grad_input = grad * slope + (saved - center) * grade + offset
  T* output;               // output, or grad_input
  void* codes;
};

// ---- Max pooling ------------------------------------------------------------------------------------------------------------

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

}  // namespace swat::cpu
