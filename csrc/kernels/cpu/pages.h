// Large pages for large buffers: memory fresh from the system costs a fault for each page that is touched first.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace swat::cpu {

inline constexpr uintptr_t kLargePage = uintptr_t{1} << 21;

// The C library maps what is larger anew each time (glibc's largest M_MMAP_THRESHOLD); smaller buffers it mostly reuses, and there
// large pages would only be cleared more often.
inline constexpr size_t kMappedBytes = size_t{32} << 20;

// Ask the system to back the whole large pages inside [data, data + bytes) by such; a hint that may be refused.
//
// Pages of 4 KiB can cost more to fault in than the result to compute. Nothing outside of the range changes.
inline void prefer_large_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kMappedBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace swat::cpu
