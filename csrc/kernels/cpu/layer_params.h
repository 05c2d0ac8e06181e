// Parameters of the kernels of the layers around the convolutions. As in params.h, strides and sizes count elements.
#pragma once

#include <cstdint>

#include "../batch_norm.h"
#include "../max_pool.h"

namespace swat::cpu {

// How the work of a batch normalisation is cut, by the sizes alone, so that results never depend on threads.
struct BatchNormShape : NormShape {
  int64_t lines = 0, line = 0;  // lines of `line` elements: the pixels of the batch, or its planes
  int64_t block_lines = 0;      // lines of one block of elements
  int64_t parts = 0,
          chunk = 0;  // of the sums: parts of the lines (samples, if planes) summed apart; channels of one task

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

}  // namespace swat::cpu
