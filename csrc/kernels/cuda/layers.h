// Launchers of the CUDA kernels for the layers around the convolutions; what launchers.h promises holds here too. Tensors are dense,
// in the order of memory.
#pragma once

#include "../batch_norm.h"
#include "../max_pool.h"
#include "types.h"

namespace swat::cuda {

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

template <typename T>
struct BatchNormParams : NormArguments<T, Compute<T>> {
  void* scratch;
};

// Sums are in double.
template <typename T>
size_t batch_norm_scratch(const NormShape& shape);
template <typename T>
cudaError_t batch_norm(const BatchNormParams<T>& params, cudaStream_t stream);

template <typename T>
struct BatchNormGradParams : NormGradArguments<T, Compute<T>> {
  void* scratch;
};

template <typename T>
size_t batch_norm_backward_scratch(const NormShape& shape);
template <typename T>
cudaError_t batch_norm_backward(const BatchNormGradParams<T>& params, cudaStream_t stream);

}  // namespace swat::cuda
