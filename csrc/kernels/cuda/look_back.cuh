// The sum over all earlier tiles, found by a kernel while it runs (decoupled look-back: D. Merrill and M. Garland, "Single-pass
// Parallel Prefix Scan with Decoupled Look-back", NVIDIA Technical Report NVR-2016-002). Sums are integers: their order cannot be
// seen. A tile waits for earlier ones alone, so tiles must be numbered in the order in which their blocks start.
#pragma once

#include "bits.h"
#include "warp.cuh"

namespace swat::cuda {

// A tile's state is one word, so that no reader sees a flag without its sum: the sum times 4, plus what it is the sum of.
inline constexpr uint64_t kUnknown = 0;
inline constexpr uint64_t kOfTile = 1;     // of this tile alone
inline constexpr uint64_t kUpToTile = 2;   // of this tile and all before it
inline constexpr uint64_t kStateKind = 3;  // mask

// Between blocks that run at the same time: past the L1 cache, each a single access.
__device__ inline void publish(uint64_t* state, uint64_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.relaxed.gpu.u64 [%0], %1;" ::"l"(state), "l"(value) : "memory");
#else
  *state = value;
#endif
}
__device__ inline uint64_t observe(const uint64_t* state) {
#ifdef __CUDA_ARCH__
  uint64_t value;
  asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(value) : "l"(state) : "memory");
  return value;
#else
  SWAT_GIVE_WAY();
  return *state;
#endif
}

// The sum over the tiles before `tile`, whose own sum is `own`. One whole warp calls it, for one tile; states start as kUnknown.
__device__ inline int64_t look_back(uint64_t* states, int64_t tile, int64_t own) {
  if (lane_id() == 0 && tile > 0) publish(&states[tile], static_cast<uint64_t>(own) << 2 | kOfTile);
  int64_t before = 0;
  for (int64_t last = tile - 1; last >= 0; last -= kWarp) {
    const int64_t at = last - lane_id();
    uint64_t state = kUpToTile;  // nothing comes before the first tile
    do {
      if (at >= 0) state = observe(&states[at]);
    } while (__ballot_sync(kAllLanes, (state & kStateKind) == kUnknown) != 0);
    const uint32_t complete = __ballot_sync(kAllLanes, (state & kStateKind) == kUpToTile);
    // Lanes up to the first complete one count: the lowest bit of `complete`, and all below it.
    const bool counts = lane_id() == 0 || (complete & low_bits(lane_id())) == 0;
    before += warp_sum(counts ? static_cast<int64_t>(state >> 2) : int64_t{0});
    if (complete != 0) break;
  }
  if (lane_id() == 0) publish(&states[tile], static_cast<uint64_t>(before + own) << 2 | kUpToTile);
  return before;
}

// Bytes of scratch, all zero before the kernel: a counter of tiles, then a state for each.
inline size_t look_back_scratch(int64_t tiles) { return (1 + tiles) * sizeof(uint64_t); }

// The tile that this block is to take: not blockIdx, as the blocks of all earlier tiles must have started.
__device__ inline int64_t next_tile(uint64_t* scratch) {
  SWAT_SHARED(number, uint32_t);
  if (threadIdx.x == 0) number = atomicAdd(reinterpret_cast<uint32_t*>(scratch), 1u);
  __syncthreads();
  return number;
}

// The sum over the tiles before `tile`, for every thread of its block.
__device__ inline int64_t block_look_back(uint64_t* scratch, int64_t tile, int64_t own) {
  SWAT_SHARED(before, int64_t);
  if (threadIdx.x < kWarp) {
    const int64_t found = look_back(scratch + 1, tile, own);
    if (lane_id() == 0) before = found;
  }
  __syncthreads();
  return before;
}

}  // namespace swat::cuda
