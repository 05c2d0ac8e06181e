// Packing of channels_last tensors whose planes are too large for one block's shared memory; see compress_plan.h.
#pragma once

#include "params.h"

namespace swat::cuda {

size_t compress_planes_scratch(int64_t numel);
template <typename T>
cudaError_t compress_planes(const CompressParams<T>& params, cudaStream_t stream);

}  // namespace swat::cuda
