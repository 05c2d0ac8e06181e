// Large blocks of memory, kept when they are freed and used again.
//
// A training step allocates the same sizes again and again. The C library gives large blocks back to the system, and each page of a
// fresh one costs a fault and is cleared: for 16 MiB more than a sparse convolution's products. Here freed pages stay, but never
// more of them than were in use at once: what the process holds through the cache never passes what its tensors needed at their peak.
//
// The largest blocks are apart. A few of them make the peak of a process, and whoever else needs memory at another moment of the step,
// PyTorch above all, could not have what lies here. They stay only while the process as a whole is well below what it needed at its own peak.
#pragma once

#include <cstddef>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace swat::cpu {

// Bytes of this process in memory, 0 if unknown.
size_t resident_bytes();

class BlockCache {
 public:
  // Smaller blocks are not worth a mapping of their own.
  static constexpr size_t kLeastBytes = size_t{1} << 20;
  // Large are blocks of so many bytes that are more than such a part of the peak.
  static constexpr size_t kLargeBytes = size_t{32} << 20, kLargeShare = 32;
  static constexpr size_t kLargeSpare = 4;  // a large block serves results smaller by up to such a part of them

  // Bytes of the process in memory, 0 if unknown.
  using Resident = size_t (*)();

  struct Usage {
    size_t used, cached, peak;  // bytes in blocks, bytes freed and kept, most bytes ever in blocks
  };

  // One for the process, and never destroyed: tensors may outlive everything else. Null where SWAT_CPU_CACHE is 0; throws
  // std::invalid_argument, saying what it may be, until it is 0, 1 or unset.
  static BlockCache* shared();

  // Without `resident`, or where it knows nothing, large blocks go back to the system as they are freed.
  explicit BlockCache(Resident resident = nullptr) : resident_(resident) {}
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;
  ~BlockCache() { trim(0); }

  // `bytes` > 0, aligned to a page at least; null where the system has no more.
  void* allocate(size_t bytes);
  void free(void* block) noexcept;

  // Give freed pages back to the system until at most `keep` bytes stay; returns how many went.
  size_t trim(size_t keep) noexcept;
  Usage usage();

  // Around fork(), so that no child inherits a locked cache.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Range {
    char* begin;
    size_t bytes;
  };

  bool is_large(size_t bytes) const { return bytes >= kLargeBytes && bytes >= peak_ / kLargeShare; }
  char* take(size_t bytes);
  Range take_large(size_t bytes);
  void insert(char* begin, size_t bytes);
  void erase(std::map<char*, size_t>::iterator range);
  void make_room(size_t bytes) noexcept;
  size_t drop_oldest_large() noexcept;
  size_t trim_locked(size_t keep) noexcept;

  const Resident resident_;
  std::mutex mutex_;
  std::unordered_map<void*, size_t> blocks_;  // in use
  std::map<char*, size_t> free_;              // cached ranges by address; neighbours are merged
  std::set<std::pair<size_t, char*>> free_by_size_;
  std::deque<Range> large_;  // cached large blocks, the one freed last at the end
  size_t used_ = 0, cached_ = 0, large_cached_ = 0, peak_ = 0;
  size_t needed_ = 0;  // most bytes seen resident, aside from what was cached
};

}  // namespace swat::cpu
