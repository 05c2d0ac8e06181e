#include "block_cache.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>

namespace swat::cpu {
namespace {

const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr size_t kLargePage = size_t{2} << 20;

// Sizes that differ a little from step to step (kept elements) share a class: at most a sixteenth is added.
size_t round_up(size_t bytes) {
  size_t step = kPage;
  while (step * 32 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// Fresh pages, large ones where the system has them: they are cleared once and used often.
char* map(size_t bytes) {
  const size_t spare = bytes >= kLargePage ? kLargePage : 0;
  void* const mapped = mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  if (spare > 0) {
    const size_t before = (kLargePage - reinterpret_cast<uintptr_t>(begin) % kLargePage) % kLargePage;
    if (before > 0) munmap(begin, before);
    begin += before;
    if (spare > before) munmap(begin + bytes, spare - before);
#ifdef MADV_HUGEPAGE
    madvise(begin, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);  // a hint
#endif
  }
  return begin;
}

constexpr const char* kVariable = "SWAT_CPU_CACHE";

// Whether the variable leaves the cache on.
bool wanted() {
  const char* const value = std::getenv(kVariable);
  const std::string_view text = value == nullptr ? "" : value;
  if (text != "" && text != "0" && text != "1") {
    throw std::invalid_argument(std::string(kVariable).append(": expected 0 or 1, got '").append(text).append("'"));
  }
  return text != "0";
}

}  // namespace

// Opened anew each time: a descriptor kept would name the parent after fork(), and a daemon closes what it did not open.
size_t resident_bytes() {
  const int file = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  char text[64];
  const ssize_t length = read(file, text, sizeof(text) - 1);
  close(file);
  if (length <= 0) return 0;
  text[length] = '\0';
  const char* const pages = std::strchr(text, ' ');  // the second number counts pages
  return pages == nullptr ? 0 : std::strtoull(pages, nullptr, 10) * kPage;
}

BlockCache* BlockCache::shared() {
  static BlockCache* const cache = [] {
    if (!wanted()) return static_cast<BlockCache*>(nullptr);
    pthread_atfork([] { shared()->lock(); }, [] { shared()->unlock(); }, [] { shared()->unlock(); });
    return new BlockCache(resident_bytes);
  }();
  return cache;
}

void BlockCache::insert(char* begin, size_t bytes) {
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && begin + bytes == next->first) {
    bytes += next->second;
    free_by_size_.erase({next->second, next->first});
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      begin = before->first;
      bytes += before->second;
      free_by_size_.erase({before->second, before->first});
      free_.erase(before);
    }
  }
  free_.emplace(begin, bytes);
  free_by_size_.emplace(bytes, begin);
}

void BlockCache::erase(std::map<char*, size_t>::iterator range) {
  free_by_size_.erase({range->second, range->first});
  free_.erase(range);
}

// The smallest cached range that is large enough, cut to size; null if there is none.
char* BlockCache::take(size_t bytes) {
  const auto found = free_by_size_.lower_bound({bytes, nullptr});
  if (found == free_by_size_.end()) return nullptr;
  const auto [size, begin] = *found;
  erase(free_.find(begin));
  cached_ -= size;
  if (size > bytes) {
    insert(begin + bytes, size - bytes);
    cached_ += size - bytes;
  }
  return begin;
}

// The large block that fits best, whole.
BlockCache::Range BlockCache::take_large(size_t bytes) {
  auto best = large_.end();
  for (auto at = large_.begin(); at != large_.end(); ++at) {
    const bool fits = at->bytes >= bytes && at->bytes - bytes <= bytes / kLargeSpare;
    if (fits && (best == large_.end() || at->bytes < best->bytes)) best = at;
  }
  if (best == large_.end()) return {nullptr, 0};
  const Range block = *best;
  large_.erase(best);
  large_cached_ -= block.bytes;
  return block;
}

size_t BlockCache::drop_oldest_large() noexcept {
  const Range block = large_.front();
  large_.pop_front();
  large_cached_ -= block.bytes;
  munmap(block.begin, block.bytes);
  return block.bytes;
}

// The process is about to grow by `bytes`: give large blocks back unless it stays as far below its peak as they are large. That much
// it may grow before it is looked at again, by tensors of PyTorch's own, which come in the same sizes.
void BlockCache::make_room(size_t bytes) noexcept {
  size_t resident = resident_ == nullptr ? 0 : resident_();
  if (resident == 0) {
    while (!large_.empty()) drop_oldest_large();
    return;
  }
  needed_ = std::max(needed_, resident - std::min(resident, cached_ + large_cached_));
  while (!large_.empty() && (resident + bytes + large_.front().bytes > needed_ ||
                             used_ + bytes + cached_ + large_cached_ > std::max(peak_, used_ + bytes))) {
    resident -= std::min(resident, drop_oldest_large());
  }
}

// Of the ranges other than large blocks.
size_t BlockCache::trim_locked(size_t keep) noexcept {
  size_t gone = 0;
  while (cached_ > keep) {
    const auto [size, begin] = *free_by_size_.begin();
    const size_t excess = (cached_ - keep + kPage - 1) / kPage * kPage;
    erase(free_.find(begin));
    const size_t cut = std::min(size, excess);
    munmap(begin + (size - cut), cut);
    if (size > cut) insert(begin, size - cut);
    cached_ -= cut;
    gone += cut;
  }
  return gone;
}

void* BlockCache::allocate(size_t bytes) {
  size_t size = round_up(bytes);
  const std::lock_guard<std::mutex> guard(mutex_);
  char* block = nullptr;
  if (size >= kLargeBytes) {
    const Range large = take_large(size);
    block = large.begin;
    if (block != nullptr) size = large.bytes;
  }
  if (block == nullptr && !is_large(size)) block = take(size);
  make_room(block == nullptr ? size : 0);
  if (block == nullptr) {
    // What does not fit makes room for what does: used and cached together stay within the peak.
    trim_locked(std::max(peak_, used_ + size) - used_ - size - large_cached_);
    block = map(size);
    if (block == nullptr) {
      while (!large_.empty()) drop_oldest_large();
      trim_locked(0);
      block = map(size);
    }
    if (block == nullptr) return nullptr;
  }
  blocks_.emplace(block, size);
  used_ += size;
  peak_ = std::max(peak_, used_);
  return block;
}

void BlockCache::free(void* block) noexcept {
  const std::lock_guard<std::mutex> guard(mutex_);
  const auto found = blocks_.find(block);
  const size_t size = found->second;
  blocks_.erase(found);
  used_ -= size;
  if (is_large(size)) {
    large_.push_back({static_cast<char*>(block), size});
    large_cached_ += size;
    make_room(0);
  } else {
    cached_ += size;
    insert(static_cast<char*>(block), size);
  }
}

size_t BlockCache::trim(size_t keep) noexcept {
  const std::lock_guard<std::mutex> guard(mutex_);
  size_t gone = 0;
  while (!large_.empty() && cached_ + large_cached_ > keep) gone += drop_oldest_large();
  gone += trim_locked(keep - std::min(keep, large_cached_));
  peak_ = used_ + cached_ + large_cached_;
  needed_ = 0;
  return gone;
}

BlockCache::Usage BlockCache::usage() {
  const std::lock_guard<std::mutex> guard(mutex_);
  return {used_, cached_ + large_cached_, peak_};
}

}  // namespace swat::cpu
