// The gradient of a bias on the CPU.
#pragma once

#include "parallel.h"
#include "params.h"
#include "table.h"

namespace swat::cpu {

// result[channel] = the sum of all pixels of the channel. The order of the additions follows from the sizes alone, neither from
// strides nor from threads: the pixels, in logical order, are cut in parts, and the sums of the parts are added in float64.
template <typename T>
void bias_grad(const KernelTable& table, const Parallel& parallel, const ImageView<const T>& grad_output, T* result);

}  // namespace swat::cpu
