// The convolutions of one sparse layer on the CPU, from geometry and pointers to finished results: planning, lists, kernels.
#pragma once

#include "parallel.h"
#include "params.h"
#include "table.h"

namespace swat::cpu {

// output[N, O, H', W'] = conv(input, weight) + bias; bias may be null.
template <typename T>
void convolution(const KernelTable& table, const Parallel& parallel, const ConvGeometry& geometry,
                 const ImageView<const T>& input, const PackedView<T>& weight, const T* bias,
                 const ImageView<T>& output);

// grad_input[N, C, H, W] = the gradient of the input, from the kept weights.
template <typename T>
void convolution_input_grad(const KernelTable& table, const Parallel& parallel, const ConvGeometry& geometry,
                            const ImageView<const T>& grad_output, const PackedView<T>& weight,
                            const ImageView<T>& grad_input);

// grad_weight[O, C / groups, kh, kw], contiguous or channels_last: the gradient of every weight, from the kept activations of the
// packed input.
template <typename T>
void convolution_weight_grad(const KernelTable& table, const Parallel& parallel, const ConvGeometry& geometry,
                             const ImageView<const T>& grad_output, const PackedView<T>& input, T* grad_weight,
                             bool channels_last);

}  // namespace swat::cpu
