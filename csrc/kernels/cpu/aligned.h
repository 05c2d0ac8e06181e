// Memory aligned to a cache line, by hand over malloc.
//
// For aligned memory, which torch's allocator and operator new ask for, glibc wants a free block somewhat larger than the freed one
// was. Blocks of a training step then hardly ever serve the next step, and the heap grows to twice its size.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace swat::cpu {

inline constexpr size_t kAlignment = 64;

// `bytes` of memory, whose first address is noted before it; null where there is none. Sizes are rounded up by at most an eighth, for
// packed values differ a little from step to step.
inline void* allocate_aligned(size_t bytes) {
  if (bytes > PTRDIFF_MAX / 2) return nullptr;
  const size_t unit = std::max<size_t>(std::bit_floor(bytes) / 8, 1);
  void* const block = std::malloc((bytes + unit - 1) / unit * unit + kAlignment + sizeof(void*));
  if (block == nullptr) return nullptr;
  const auto at = (reinterpret_cast<uintptr_t>(block) + sizeof(void*) + kAlignment - 1) / kAlignment * kAlignment;
  void** const data = reinterpret_cast<void**>(at);
  data[-1] = block;
  return data;
}

inline void free_aligned(void* data) {
  if (data != nullptr) std::free(static_cast<void**>(data)[-1]);
}

}  // namespace swat::cpu
