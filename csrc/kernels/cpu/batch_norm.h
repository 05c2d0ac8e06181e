// Batch normalisation with the statistics of the batch, on the CPU.
#pragma once

#include "layer_params.h"
#include "parallel.h"
#include "table.h"

namespace swat::cpu {

template <typename T>
void batch_norm(const KernelTable& table, const Parallel& parallel, const NormArguments<T, T>& arguments);

template <typename T>
void batch_norm_backward(const KernelTable& table, const Parallel& parallel, const NormGradArguments<T, T>& arguments);

}  // namespace swat::cpu
