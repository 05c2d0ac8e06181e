#include "kernels/cpu/block_cache.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace swat::cpu {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

void expect_usage(BlockCache& cache, size_t used, size_t cached) {
  const BlockCache::Usage usage = cache.usage();
  EXPECT_EQ(usage.used, used);
  EXPECT_EQ(usage.cached, cached);
}

TEST(BlockCache, UsesAFreedBlockAgain) {
  BlockCache cache;
  void* const first = cache.allocate(4 * kMiB);
  std::memset(first, 1, 4 * kMiB);
  cache.free(first);
  expect_usage(cache, 0, 4 * kMiB);
  EXPECT_EQ(cache.allocate(4 * kMiB), first);
  expect_usage(cache, 4 * kMiB, 0);
  cache.free(first);
}

TEST(BlockCache, CutsAndMergesRanges) {
  BlockCache cache;
  void* const whole = cache.allocate(12 * kMiB);
  cache.free(whole);
  std::vector<void*> parts;
  for (int i = 0; i < 3; ++i) parts.push_back(cache.allocate(4 * kMiB));
  expect_usage(cache, 12 * kMiB, 0);
  for (int i : {0, 2, 1}) cache.free(parts[i]);
  EXPECT_EQ(cache.allocate(12 * kMiB), whole);  // only one range can be that large
  cache.free(whole);
}

TEST(BlockCache, TakesTheSmallestRangeThatFits) {
  BlockCache cache;
  void* const large = cache.allocate(16 * kMiB);
  void* const between = cache.allocate(kMiB);
  void* const small = cache.allocate(2 * kMiB);
  void* const after = cache.allocate(kMiB);
  cache.free(large);
  cache.free(small);
  EXPECT_EQ(cache.allocate(2 * kMiB), small);
  for (void* block : {between, small, after}) cache.free(block);
}

TEST(BlockCache, NeverHoldsMoreThanItsPeak) {
  BlockCache cache;
  void* const a = cache.allocate(4 * kMiB);
  void* const b = cache.allocate(4 * kMiB);
  cache.free(a);
  cache.free(b);
  // Two ranges of 4, or one of 8 where the system laid them side by side: a block of 6 fits beside at most 2 more.
  void* const c = cache.allocate(6 * kMiB);
  const BlockCache::Usage usage = cache.usage();
  EXPECT_EQ(usage.used, 6 * kMiB);
  EXPECT_LE(usage.used + usage.cached, 8 * kMiB);
  EXPECT_EQ(usage.peak, 8 * kMiB);
  cache.free(c);
}

TEST(BlockCache, TrimGivesPagesBack) {
  BlockCache cache;
  void* const block = cache.allocate(8 * kMiB);
  void* const kept = cache.allocate(2 * kMiB);
  std::memset(kept, 7, 2 * kMiB);
  cache.free(block);
  EXPECT_EQ(cache.trim(3 * kMiB), 5 * kMiB);
  expect_usage(cache, 2 * kMiB, 3 * kMiB);
  EXPECT_EQ(cache.trim(0), 3 * kMiB);
  expect_usage(cache, 2 * kMiB, 0);
  EXPECT_EQ(cache.usage().peak, 2 * kMiB);
  EXPECT_EQ(static_cast<const char*>(kept)[2 * kMiB - 1], 7);
  cache.free(kept);
}

constexpr size_t kLarge = BlockCache::kLargeBytes;

TEST(BlockCache, GivesLargeBlocksBackWhereItCannotSeeTheProcess) {
  BlockCache cache;
  void* const block = cache.allocate(kLarge);
  static_cast<char*>(block)[kLarge - 1] = 1;
  expect_usage(cache, kLarge, 0);
  cache.free(block);
  expect_usage(cache, 0, 0);
  void* const smaller = cache.allocate(kLarge / 2);
  cache.free(smaller);
  expect_usage(cache, 0, kLarge / 2);
}

TEST(BlockCache, KeepsLargeBlocksThatAreASmallPartOfThePeak) {
  BlockCache cache;
  std::vector<void*> blocks;
  for (size_t i = 0; i <= BlockCache::kLargeShare; ++i) blocks.push_back(cache.allocate(kLarge));
  for (void* block : blocks) cache.free(block);
  expect_usage(cache, 0, blocks.size() * kLarge);
}

size_t resident = 0;  // what the caches below are told

// A cache of a process that has once needed 1 GiB, of which `kLarge` times four came from the cache.
struct CacheOfLargeProcess {
  CacheOfLargeProcess() {
    resident = 1024 * kMiB;
    std::vector<void*> blocks;
    for (int i = 0; i < 4; ++i) blocks.push_back(cache.allocate(kLarge));
    for (void* block : blocks) cache.free(block);
    expect_usage(cache, 0, 0);
  }
  BlockCache cache{[] { return resident; }};
};

TEST(BlockCache, KeepsLargeBlocksWhileTheProcessIsBelowItsPeak) {
  CacheOfLargeProcess process;
  BlockCache& cache = process.cache;
  resident = 512 * kMiB;
  void* const block = cache.allocate(2 * kLarge);
  cache.free(block);
  expect_usage(cache, 0, 2 * kLarge);
  EXPECT_EQ(cache.allocate(2 * kLarge - kMiB), block);
  expect_usage(cache, 2 * kLarge, 0);  // the whole block: no remainder is left over
  cache.free(block);

  // Much smaller results do not get it, large or not.
  void* const large = cache.allocate(kLarge);
  void* const small = cache.allocate(kLarge / 4);
  expect_usage(cache, kLarge + kLarge / 4, 2 * kLarge);
  cache.free(large);
  cache.free(small);
  expect_usage(cache, 0, 3 * kLarge + kLarge / 4);
  EXPECT_EQ(cache.trim(kLarge), 3 * kLarge);
  expect_usage(cache, 0, kLarge / 4);
}

TEST(BlockCache, GivesLargeBlocksBackWhenTheProcessNearsItsPeak) {
  CacheOfLargeProcess process;
  BlockCache& cache = process.cache;
  resident = 512 * kMiB;
  void* const first = cache.allocate(2 * kLarge);
  void* const second = cache.allocate(kLarge);
  cache.free(first);
  cache.free(second);
  expect_usage(cache, 0, 3 * kLarge);
  // Others have grown: the block freed first goes, and the process is then below its peak by more than the second's size.
  resident = 1024 * kMiB - 2 * kLarge;
  void* const small = cache.allocate(kMiB);
  expect_usage(cache, kMiB, kLarge);
  resident = 1024 * kMiB;
  cache.free(small);
  expect_usage(cache, 0, kLarge + kMiB);  // the process is looked at when it may grow, or a large block is freed
  void* const again = cache.allocate(kMiB);
  expect_usage(cache, kMiB, 0);
  cache.free(again);
}

TEST(BlockCache, GivesLargeBlocksBackWhereItNoLongerSeesTheProcess) {
  CacheOfLargeProcess process;
  BlockCache& cache = process.cache;
  resident = 512 * kMiB;
  void* const block = cache.allocate(kLarge);
  cache.free(block);
  expect_usage(cache, 0, kLarge);
  resident = 0;
  void* const small = cache.allocate(kMiB);
  expect_usage(cache, kMiB, 0);
  cache.free(small);
}

// 0 where `resident_bytes` says what this process, a child that has closed what it inherited, has in memory.
int check_resident_in_child() {
  for (int file = 3; file < 64; ++file) close(file);
  while (open("/dev/zero", O_RDONLY) < 16) {
  }
  const size_t before = resident_bytes();
  std::vector<char> grown(64 * kMiB, 1);
  return before > 0 && resident_bytes() >= before + 60 * kMiB && grown[kMiB] == 1 ? 0 : 1;
}

TEST(ResidentBytes, AreThoseOfAForkedChild) {
  if (resident_bytes() == 0) GTEST_SKIP() << "there is no /proc";
  const pid_t child = fork();
  if (child == 0) _exit(check_resident_in_child());
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(BlockCache, LargeBlocksStayWithinThePeakToo) {
  CacheOfLargeProcess process;
  BlockCache& cache = process.cache;
  resident = 100 * kMiB;
  std::vector<void*> blocks;
  for (size_t i = 0; i < 4; ++i) blocks.push_back(cache.allocate(kLarge));
  for (void* block : blocks) cache.free(block);
  expect_usage(cache, 0, 4 * kLarge);
  void* const block = cache.allocate(2 * kLarge);  // none fits: two of them make room
  expect_usage(cache, 2 * kLarge, 2 * kLarge);
  cache.free(block);
  expect_usage(cache, 0, 4 * kLarge);
}

TEST(BlockCache, SaysWhenThereIsNoMemory) {
  BlockCache cache;
  EXPECT_EQ(cache.allocate(size_t{1} << 60), nullptr);
  expect_usage(cache, 0, 0);
}

// Blocks of random sizes: none ever overlaps another, contents stay, and the bounds hold at every moment.
TEST(BlockCache, KeepsBlocksApart) {
  BlockCache cache;
  std::mt19937 random(3);
  struct Block {
    unsigned char* data;
    size_t bytes;
    unsigned char mark;
  };
  std::vector<Block> blocks;
  for (int round = 0; round < 3000; ++round) {
    if (blocks.size() < 20 && random() % 2) {
      const size_t bytes = random() % (6 * kMiB) + 1;
      auto* const data = static_cast<unsigned char*>(cache.allocate(bytes));
      ASSERT_NE(data, nullptr);
      const auto mark = static_cast<unsigned char>(random());
      data[0] = data[bytes / 2] = data[bytes - 1] = mark;
      for (const Block& other : blocks) ASSERT_TRUE(data + bytes <= other.data || other.data + other.bytes <= data);
      blocks.push_back({data, bytes, mark});
    } else if (!blocks.empty()) {
      std::swap(blocks[random() % blocks.size()], blocks.back());
      const Block block = blocks.back();
      blocks.pop_back();
      ASSERT_EQ(block.data[0], block.mark);
      ASSERT_EQ(block.data[block.bytes / 2], block.mark);
      ASSERT_EQ(block.data[block.bytes - 1], block.mark);
      cache.free(block.data);
    }
    if (round % 500 == 499) cache.trim(random() % (4 * kMiB));
    size_t bytes = 0;
    for (const Block& block : blocks) bytes += block.bytes;
    const BlockCache::Usage usage = cache.usage();
    ASSERT_GE(usage.used, bytes);
    ASSERT_LE(usage.used, bytes + bytes / 16 + blocks.size() * 4096);
    ASSERT_LE(usage.used + usage.cached, usage.peak);
  }
  for (const Block& block : blocks) cache.free(block.data);
  expect_usage(cache, 0, cache.usage().cached);
}

TEST(BlockCache, ServesThreads) {
  BlockCache cache;
  std::vector<std::thread> threads;
  for (int id = 1; id <= 4; ++id) {
    threads.emplace_back([&cache, id] {
      for (int round = 0; round < 300; ++round) {
        const size_t bytes = kMiB + round * 4096;
        auto* const data = static_cast<unsigned char*>(cache.allocate(bytes));
        data[0] = data[bytes - 1] = static_cast<unsigned char>(id);
        std::this_thread::yield();
        ASSERT_EQ(data[0], id);
        ASSERT_EQ(data[bytes - 1], id);
        cache.free(data);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(cache.usage().used, 0u);
}

}  // namespace
}  // namespace swat::cpu
