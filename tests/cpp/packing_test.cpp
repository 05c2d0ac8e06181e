#include "kernels/cpu/packing.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "tables.h"

namespace swat::cpu {
namespace {

template <typename T>
struct Packed {
  std::vector<T> values;
  std::vector<uint64_t> words;
  std::vector<int64_t> ranks;
};

template <typename T>
Packed<T> compress_all(const KernelTable& table, const PlanesView<const T>& view, T threshold, int64_t thread_count) {
  Packed<T> packed;
  packed.words.assign((view.numel + 63) / 64, ~uint64_t{0});
  packed.ranks.assign((view.numel + kBlockBits - 1) / kBlockBits, -1);
  compress<T>(table, threads(thread_count), view, threshold, packed.words.data(), packed.ranks.data(),
              [&](int64_t kept) {
                packed.values.resize(kept);
                return packed.values.data();
              });
  return packed;
}

template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename T>
T draw(std::mt19937& random) {
  static const T special[] = {T{0},
                              -T{0},
                              std::numeric_limits<T>::quiet_NaN(),
                              std::numeric_limits<T>::infinity(),
                              std::numeric_limits<T>::denorm_min(),
                              T{1},
                              T{-1}};
  if (random() % 16 == 0) return special[random() % std::size(special)];
  return static_cast<T>(std::normal_distribution<double>()(random));
}

template <typename T>
void check_compress(const KernelTable& table) {
  std::mt19937 random(7);
  for (int round = 0; round < 60; ++round) {
    const int64_t outer = random() % 3 + 1, channels = random() % 40 + 1, pixels = random() % 150 + 1;
    const bool channels_last = round % 2;
    const int64_t numel = outer * channels * pixels;
    std::vector<T> data(numel);
    for (T& v : data) v = draw<T>(random);
    PlanesView<const T> view{.data = data.data(),
                             .channels = channels,
                             .pixels = pixels,
                             .numel = numel,
                             .outer_stride = channels * pixels,
                             .channel_stride = channels_last ? 1 : pixels,
                             .pixel_stride = channels_last ? channels : 1};
    const T threshold = round % 5 == 0 ? T{0} : static_cast<T>(1.0);
    const Packed<T> packed = compress_all<T>(table, view, threshold, round % 4 + 1);

    std::vector<T> restored(numel, T{5});
    PlanesView<T> target{restored.data(),   view.channels,       view.pixels,      view.numel,
                         view.outer_stride, view.channel_stride, view.pixel_stride};
    decompress<T>(table, threads(2), {packed.values.data(), packed.words.data(), packed.ranks.data(), numel}, target);
    std::vector<T> taken(packed.values.size());
    take<T>(table, threads(3), {nullptr, packed.words.data(), packed.ranks.data(), numel}, view, taken.data());
    size_t next = 0;
    for (int64_t i = 0; i < numel; ++i) {
      const int64_t at = i / (channels * pixels) * view.outer_stride + i / pixels % channels * view.channel_stride +
                         i % pixels * view.pixel_stride;
      const T v = data[at];
      const bool kept = !(std::abs(v) < threshold) && v != 0;
      if (i % kBlockBits == 0) {
        ASSERT_EQ(packed.ranks[i / kBlockBits], static_cast<int64_t>(next));
      }
      ASSERT_EQ(packed.words[i / 64] >> (i % 64) & 1, kept) << "element " << i << " of " << numel;
      if (kept) {
        ASSERT_LT(next, packed.values.size());
        ASSERT_TRUE(same_bits(taken[next], v));
        ASSERT_TRUE(same_bits(packed.values[next++], v));
      }
      ASSERT_TRUE(same_bits(restored[at], kept ? v : T{0}));
    }
    ASSERT_EQ(next, packed.values.size());
    Packed<T> changed = packed;
    auto counted = [&] { return count_kept(table, threads(2), changed.words.data(), changed.ranks.data(), numel); };
    EXPECT_EQ(counted(), static_cast<int64_t>(next));
    changed.ranks[random() % changed.ranks.size()] += 1;
    EXPECT_EQ(counted(), std::nullopt);
    changed.ranks = packed.ranks;
    if (numel % 64) {
      changed.words.back() |= uint64_t{1} << (numel % 64);
      EXPECT_EQ(counted(), std::nullopt);
    }
    // Bits past the end stay clear: counting relies on it.
    if (numel % 64) {
      ASSERT_EQ(packed.words.back() >> (numel % 64), 0u);
    }
  }
}

template <typename T>
void check_kth(const KernelTable& table) {
  std::mt19937 random(11);
  for (int64_t count : {1, 2, 5, 64, 1000, 70000}) {
    std::vector<T> data(count), sorted(count);
    for (T& v : data) v = draw<T>(random);
    std::transform(data.begin(), data.end(), sorted.begin(), [](T v) { return std::abs(v); });
    std::sort(sorted.begin(), sorted.end(), [](T a, T b) { return std::isnan(a) ? !std::isnan(b) : a > b; });
    for (int64_t k : {int64_t{1}, (count + 1) / 2, count}) {
      const T found = kth_magnitude<T>(table, threads(3), data.data(), count, k);
      if (std::isnan(sorted[k - 1])) {
        EXPECT_TRUE(std::isnan(found));
      } else {
        EXPECT_EQ(found, sorted[k - 1]) << k << " of " << count;
      }
    }
  }
}

class PackingTest : public TableTest {};

TEST_P(PackingTest, CompressesAndRestoresFloat) { check_compress<float>(table()); }
TEST_P(PackingTest, CompressesAndRestoresDouble) { check_compress<double>(table()); }
TEST_P(PackingTest, FindsTheKthMagnitudeOfFloat) { check_kth<float>(table()); }
TEST_P(PackingTest, FindsTheKthMagnitudeOfDouble) { check_kth<double>(table()); }

INSTANTIATE_TEST_SUITE_P(Sets, PackingTest, testing::ValuesIn(tables()), table_name);

}  // namespace
}  // namespace swat::cpu
