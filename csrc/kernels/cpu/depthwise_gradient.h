// The weight gradient of convolutions whose groups have few output channels (depthwise_grad.inl).
#pragma once

#include "parallel.h"
#include "params.h"
#include "table.h"

namespace swat::cpu {

// Whether its kernel is mostly the faster one, for vectors of `lanes` elements.
bool suits_depthwise(const ConvGeometry& geometry, int64_t lanes);

// As convolution_weight_grad, of an input that is not empty.
template <typename T>
void depthwise_weight_grad(const KernelTable& table, const Parallel& parallel, const ConvGeometry& geometry,
                           const ImageView<const T>& grad_output, const PackedView<T>& input, T* grad_weight,
                           bool channels_last);

}  // namespace swat::cpu
