// A warp writes a run of a packed tensor into shared memory.
#pragma once

#include "bits.h"
#include "params.h"
#include "warp.cuh"

namespace swat::cuda {

// Kept elements before element `index` < numel, for all lanes, which share the counting of the words before it.
template <typename T>
__device__ inline int64_t warp_rank_before(const PackedView<T>& packed, int64_t index) {
  const int64_t block = index / kBlockBits, word = block * kBlockWords + lane_id(), at = index / 64;
  int count = 0;
  if (word < at) count = count_bits(packed.words[word]);
  if (word == at) count = count_bits(packed.words[word] & ((uint64_t{1} << (index % 64)) - 1));
  return packed.ranks[block] + warp_sum(count);
}

// put(i, value) for i in [0, length): elements [index, index + length) of `packed`, dropped ones zero. All lanes call it.
template <typename T, typename Put>
__device__ inline void expand_run(const PackedView<T>& packed, int64_t index, int length, Put put) {
  if (length <= 0) return;
  int64_t rank = warp_rank_before(packed, index);
  for (int first = 0; first < length; first += kWarp) {
    const uint32_t bits = bits_at(packed.words, packed.numel, index + first) & low_bits(length - first);
    if (first + lane_id() < length) {
      const bool kept = bits >> lane_id() & 1;
      put(first + lane_id(), kept ? packed.values[rank + count_bits(bits & low_bits(lane_id()))] : from_bits<T>(0));
    }
    rank += count_bits(bits);
  }
}

}  // namespace swat::cuda
