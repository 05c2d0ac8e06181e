// Max pooling on the CPU, which keeps one byte an output.
#pragma once

#include "layer_params.h"
#include "parallel.h"
#include "table.h"

namespace swat::cpu {

// output and positions [batch, channels, out_height, out_width], in the layout of the input.
template <typename T>
void max_pool(const KernelTable& table, const Parallel& parallel, const MaxPoolShape& shape, const T* input, T* output,
              uint8_t* positions);

// grad_input, written whole.
template <typename T>
void max_pool_backward(const KernelTable& table, const Parallel& parallel, const MaxPoolShape& shape,
                       const T* grad_output, const uint8_t* positions, T* grad_input);

}  // namespace swat::cpu
