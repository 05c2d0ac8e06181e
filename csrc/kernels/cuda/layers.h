// Launchers of the CUDA kernels for the layers around the convolutions; what launchers.h promises holds here too. Tensors are dense,
// in the order of memory: contiguous, or channels_last.
#pragma once

#include "../cpu/layer_params.h"
#include "types.h"

namespace swat::cuda {

using swat::cpu::MaxPoolShape;
using swat::cpu::Saved;

// output = input where it is above zero or NaN, else 0; bit i of `words` [ceil(numel / 64)] says whether the gradient of element i
// passes. `output` may be `input`.
template <typename T>
cudaError_t relu(const T* input, int64_t numel, T* output, uint64_t* words, cudaStream_t stream);

// grad_input = grad_output where the bit is set, else 0.
template <typename T>
cudaError_t relu_backward(const T* grad_output, const uint64_t* words, int64_t numel, T* grad_input,
                          cudaStream_t stream);

// output and positions [batch, channels, out_height, out_width], in the layout of the input; an image has less than 2^31 elements.
template <typename T>
cudaError_t max_pool(const MaxPoolShape& shape, const T* input, T* output, uint8_t* positions, cudaStream_t stream);

// grad_input, written whole: each element gathers from its windows, in their order.
template <typename T>
cudaError_t max_pool_backward(const MaxPoolShape& shape, const T* grad_output, const uint8_t* positions, T* grad_input,
                              cudaStream_t stream);

// A dense [batch, channels, pixels] tensor: `channels_last` is [batch * pixels][channels] in memory.
struct NormShape {
  int64_t batch, channels, pixels;
  bool channels_last;

  int64_t numel() const { return batch * channels * pixels; }
};

// A number for each channel in T, or in Compute<T>: half layers may have float weights.
struct NormWeight {
  const void* data;  // null: 1 for a weight, 0 for a bias
  bool narrow;       // whether it is T
};

// Arrays are [channels], codes of all elements in the order of memory.
template <typename T>
struct BatchNormParams {
  NormShape shape;
  const T* input;
  NormWeight weight, bias;
  double eps;
  Saved saved;
  const int64_t* seed;  // null: 0
  T* output;
  double *mean, *invstd, *variance;  // the variance with the divisor count - 1
  void* codes;                       // unless exact
  Compute<T>* scale;                 // int8: the unit of the codes
  void* scratch;
};

// output = (input - mean) / sqrt(variance + eps) * weight + bias. Sums are in double.
template <typename T>
size_t batch_norm_scratch(const BatchNormParams<T>& params);
template <typename T>
cudaError_t batch_norm(const BatchNormParams<T>& params, cudaStream_t stream);

template <typename T>
struct BatchNormGradParams {
  NormShape shape;
  const T* grad_output;
  Saved saved;
  const void* values;       // the input or its codes
  const Compute<T>* scale;  // int8
  const double *mean, *invstd;
  NormWeight weight;
  T* grad_input;
  void *grad_weight, *grad_bias;
  bool narrow;  // whether these are T
  void* scratch;
};

template <typename T>
size_t batch_norm_backward_scratch(const BatchNormGradParams<T>& params);
template <typename T>
cudaError_t batch_norm_backward(const BatchNormGradParams<T>& params, cudaStream_t stream);

}  // namespace swat::cuda
