// Sums and scans over the threads of a warp and of a block.
#pragma once

#include "platform.h"

namespace swat::cuda {

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

template <typename V>
__device__ inline V warp_sum(V value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Sum over the lanes before this one.
template <typename V>
__device__ inline V warp_exclusive(V value) {
  V inclusive = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const V below = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane_id() >= step) inclusive += below;
  }
  return inclusive - value;
}

// Sum over the threads of the block before this one; *total is that of all. `shared` holds one V a warp, 33 at most; calls may
// follow each other without a barrier in between. Every thread of the block calls it.
template <typename V>
__device__ inline V block_exclusive(V value, V* shared, V* total) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const V before = warp_exclusive(value);
  __syncthreads();  // what an earlier call left may still be read
  if (lane_id() == kWarp - 1) shared[warp] = before + value;
  __syncthreads();
  if (warp == 0) {
    const V mine = lane_id() < warps ? shared[lane_id()] : V{0};
    const V offset = warp_exclusive(mine);
    __syncwarp();
    if (lane_id() < warps) shared[lane_id()] = offset;
    if (lane_id() == kWarp - 1) shared[kWarp] = offset + mine;
  }
  __syncthreads();
  *total = shared[kWarp];
  return shared[warp] + before;
}

}  // namespace swat::cuda
