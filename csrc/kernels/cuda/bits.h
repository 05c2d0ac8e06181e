// Reading the packed form: a bitmap of 64-bit words, lowest bit first, and the number of kept elements before each 1024.
#pragma once

#include "platform.h"

namespace swat::cuda {

inline constexpr int kBlockBits = 1024;  // elements between two entries of the rank directory
inline constexpr int kBlockWords = kBlockBits / 64;
inline constexpr int kBlockHalves = kBlockBits / 32;  // a warp holds a block, 32 bits a lane

SWAT_HOST_DEVICE inline int count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}
SWAT_HOST_DEVICE inline int count_bits(uint64_t bits) {
  return count_bits(static_cast<uint32_t>(bits)) + count_bits(static_cast<uint32_t>(bits >> 32));
}

SWAT_HOST_DEVICE inline int64_t word_count(int64_t numel) { return ceil_div(numel, 64); }
SWAT_HOST_DEVICE inline int64_t block_count(int64_t numel) { return ceil_div(numel, kBlockBits); }

// Kept elements before element `index` < numel.
SWAT_HOST_DEVICE inline int64_t rank_before(const uint64_t* words, const int64_t* ranks, int64_t index) {
  const int64_t block = index / kBlockBits, word = index / 64;
  int count = 0;
  for (int64_t i = block * kBlockWords; i < word; ++i) count += count_bits(words[i]);
  return ranks[block] + count + count_bits(words[word] & ((uint64_t{1} << (index % 64)) - 1));
}

// The 32 bits from element `index` on, lowest first; zeros past the end. 0 <= index < numel.
SWAT_HOST_DEVICE inline uint32_t bits_at(const uint64_t* words, int64_t numel, int64_t index) {
  const int64_t word = index / 64;
  const int shift = static_cast<int>(index % 64);
  uint64_t bits = words[word] >> shift;
  if (shift > 32 && word + 1 < word_count(numel)) bits |= words[word + 1] << (64 - shift);
  return static_cast<uint32_t>(bits);
}

// The lowest `count` bits, 0 <= count <= 32.
SWAT_HOST_DEVICE inline uint32_t low_bits(int count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

}  // namespace swat::cuda
