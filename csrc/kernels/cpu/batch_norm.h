// Batch normalisation with the statistics of the batch, on the CPU.
#pragma once

#include "layer_params.h"
#include "parallel.h"
#include "table.h"

namespace swat::cpu {

BatchNormShape batch_norm_shape(int64_t batch, int64_t channels, int64_t pixels, bool channels_last);

// What a forward pass writes: arrays of `channels`, and of `numel` in the order of memory.
template <typename T>
struct BatchNormResult {
  T* output;
  double *mean, *invstd, *variance;  // the variance with the divisor count - 1
  void* codes;                       // unless exact
  T* scale;                          // int8: the unit of the codes
};

// output = (input - mean) / sqrt(variance + eps) * weight + bias; weight and bias may be null.
template <typename T>
void batch_norm(const KernelTable& table, const Parallel& parallel, const BatchNormShape& shape, const T* input,
                const T* weight, const T* bias, double eps, Saved saved, int64_t seed, const BatchNormResult<T>& to);

// What a backward pass reads.
template <typename T>
struct BatchNormSaved {
  Saved form;
  const void* values;  // the input or its codes
  const T* scale;      // int8
  const double *mean, *invstd;
  const T* weight;  // may be null
};

template <typename T>
void batch_norm_backward(const KernelTable& table, const Parallel& parallel, const BatchNormShape& shape,
                         const T* grad_output, const BatchNormSaved<T>& from, T* grad_input, T* grad_weight,
                         T* grad_bias);

}  // namespace swat::cpu
