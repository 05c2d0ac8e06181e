// ReLU on the CPU, which keeps one bit an element.
#pragma once

#include "parallel.h"
#include "table.h"

namespace swat::cpu {

// output = relu(input) of `numel` elements, in memory order; bit i of `words` [ceil(numel / 64)] says whether the gradient of
// element i passes. `output` may be `input`.
template <typename T>
void relu(const KernelTable& table, const Parallel& parallel, const T* input, int64_t numel, T* output,
          uint64_t* words);

// grad_input = grad_output where the bit is set, else 0.
template <typename T>
void relu_backward(const KernelTable& table, const Parallel& parallel, const T* grad_output, const uint64_t* words,
                   int64_t numel, T* grad_input);

}  // namespace swat::cpu
