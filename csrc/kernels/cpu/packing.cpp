#include "packing.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace swat::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // below this a thread costs more than it saves
constexpr int64_t kGrainBlocks = 1 << 10;    // of the rank directory
constexpr int64_t kTaskElements = 1 << 18;   // compressed in one go: a few of them a thread, so that none waits long
constexpr int64_t kShortPlane = 64;          // pixels whose bits are less than a word
constexpr int64_t kMostOffsets = 1 << 16;    // a table of that many is read from the caches

}  // namespace

template <typename T>
T kth_magnitude(const KernelTable& table, const Parallel& parallel, const T* data, int64_t count, int64_t k) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kBits = sizeof(T) * 8 - 1;
  const int64_t parts = std::clamp<int64_t>(count / kGrainElements, 1, parallel.threads);
  std::vector<int64_t> counts(parts * kMagnitudeDigits);
  uint64_t prefix = 0;
  for (int shift = ceil_div(kBits, kMagnitudeDigitBits) * kMagnitudeDigitBits; shift > 0;) {
    shift -= kMagnitudeDigitBits;
    std::fill(counts.begin(), counts.end(), 0);
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        table.of<T>().magnitude_histogram(data, count * i / parts, count * (i + 1) / parts, prefix, shift,
                                          counts.data() + i * kMagnitudeDigits);
      }
    });
    for (int64_t i = 1; i < parts; ++i) {
      for (int d = 0; d < kMagnitudeDigits; ++d) counts[d] += counts[i * kMagnitudeDigits + d];
    }
    int digit = kMagnitudeDigits - 1;
    while (counts[digit] < k) k -= counts[digit--];
    prefix = prefix << kMagnitudeDigitBits | static_cast<uint64_t>(digit);
  }
  return std::bit_cast<T>(static_cast<Bits>(prefix));
}

template <typename T>
void compress(const KernelTable& table, const Parallel& parallel, const PlanesView<const T>& view, T threshold,
              uint64_t* words, int64_t* ranks, const std::function<T*(int64_t kept)>& allocate) {
  const Kernels<T>& kernels = table.of<T>();
  const int64_t planes = view.pixels == 0 ? 0 : ceil_div(view.numel, view.pixels);
  std::fill_n(words, ceil_div(view.numel, 64), uint64_t{0});

  // Values go to a buffer of the range's own first, since where they belong is known only once all are counted.
  struct Part {
    int64_t kept;
    GrowingBuffer<T> values;
  };
  std::vector<std::unique_ptr<Part>> parts;
  // Channels-last planes are cut by samples where there are enough of them: a part of the channels is a piece of each pixel.
  const bool by_sample = view.channel_stride == 1 && view.pixel_stride != 1;
  const int64_t together = by_sample && planes >= 2 * parallel.threads * view.channels ? view.channels : 1;
  const int64_t units = ceil_div(planes, together);
  const int64_t unit_elements = std::max<int64_t>(1, together * view.pixels);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / unit_elements);
  // Ranges are cut here and not by the thread pool, so that each can be found again in order.
  const int64_t ranges = std::clamp<int64_t>(units / grain, 1, 2 * parallel.threads);
  parts.resize(ranges);
  const int64_t step = std::max<int64_t>(kernels.lanes, together * std::max<int64_t>(1, kTaskElements / unit_elements));
  parallel(planes == 0 ? 0 : ranges, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(kernels.compress_scratch(view));
    for (int64_t i = begin; i < end; ++i) {
      auto part = std::make_unique<Part>();
      const int64_t first = units * i / ranges * together;
      part->kept = 0;
      const int64_t last = std::min(planes, units * (i + 1) / ranges * together);
      for (int64_t plane = first; plane < last; plane += step) {
        const int64_t stop = std::min(last, plane + step);
        part->values.reserve(part->kept + (stop - plane) * (view.pixels + kPlaneSpare) + kernels.lanes);
        part->kept += kernels.compress_planes(view, threshold, plane, stop, words, scratch.data(),
                                              part->values.data() + part->kept);
      }
      parts[i] = std::move(part);
    }
  });

  const int64_t blocks = ceil_div(view.numel, kBlockBits);
  parallel(blocks, kGrainBlocks,
           [&](int64_t begin, int64_t end) { kernels.count_blocks(words, view.numel, begin, end, ranks); });
  int64_t kept = 0;
  for (int64_t i = 0; i < blocks; ++i) kept += std::exchange(ranks[i], kept);

  T* const values = allocate(kept);
  if (planes == 0) return;
  std::vector<int64_t> offsets(ranges + 1, 0);
  for (int64_t i = 0; i < ranges; ++i) offsets[i + 1] = offsets[i] + parts[i]->kept;
  parallel(ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (parts[i]->kept > 0) std::memcpy(values + offsets[i], parts[i]->values.data(), parts[i]->kept * sizeof(T));
    }
  });
}

std::optional<int64_t> count_kept(const KernelTable& table, const Parallel& parallel, const uint64_t* words,
                                  const int64_t* ranks, int64_t numel) {
  if (numel == 0) return 0;
  const int64_t blocks = ceil_div(numel, kBlockBits);
  std::atomic<bool> agree = numel % 64 == 0 || words[numel / 64] >> (numel % 64) == 0;
  parallel(blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    if (!table.float32.ranks_agree(words, ranks, numel, begin, end)) agree = false;
  });
  if (!agree) return std::nullopt;
  return kept_elements(words, ranks, numel);
}

int64_t kept_elements(const uint64_t* words, const int64_t* ranks, int64_t numel) {
  if (numel == 0) return 0;
  const int64_t last = (numel - 1) / kBlockBits;
  int64_t kept = ranks[last];
  for (int64_t i = last * (kBlockBits / 64); i < ceil_div(numel, 64); ++i) kept += std::popcount(words[i]);
  return kept;
}

std::vector<int64_t> whole_slices(const uint64_t* words, int64_t numel, int64_t slices) {
  std::vector<int64_t> found;
  if (numel == 0) return found;
  const int64_t length = numel / slices;
  for (int64_t slice = 0; slice < slices; ++slice) {
    bool whole = true;
    for (int64_t at = slice * length, end = at + length, next; whole && at < end; at = next) {
      next = std::min(end, (at / 64 + 1) * 64);
      const uint64_t bits = ~uint64_t{0} >> (64 - (next - at)) << at % 64;
      whole = (words[at / 64] & bits) == bits;
    }
    if (whole) found.push_back(slice);
  }
  return found;
}

template <typename T>
void decompress(const KernelTable& table, const Parallel& parallel, const PackedView<T>& packed,
                const PlanesView<T>& view) {
  if (view.numel == 0) return;
  parallel(ceil_div(view.numel, view.pixels), std::max<int64_t>(1, kGrainElements / view.pixels),
           [&](int64_t begin, int64_t end) { table.of<T>().decompress_planes(packed, view, begin, end); });
}

template <typename T>
void take(const KernelTable& table, const Parallel& parallel, const PackedView<T>& packed,
          const PlanesView<const T>& view, T* values) {
  if (view.numel == 0) return;
  const Kernels<T>& kernels = table.of<T>();
  const int64_t elements = view.channels * view.pixels;
  const int64_t farthest = (view.channels - 1) * view.channel_stride + (view.pixels - 1) * view.pixel_stride;
  if (view.pixel_stride != 1 && view.pixels < kShortPlane && elements <= kMostOffsets && farthest <= INT32_MAX) {
    std::vector<int32_t> offsets(elements);
    for (int64_t i = 0; i < elements; ++i) {
      offsets[i] = static_cast<int32_t>(i / view.pixels * view.channel_stride + i % view.pixels * view.pixel_stride);
    }
    parallel(view.numel / elements, std::max<int64_t>(1, kGrainElements / elements), [&](int64_t begin, int64_t end) {
      kernels.take_samples(packed, view, offsets.data(), begin, end, values);
    });
    return;
  }
  parallel(ceil_div(view.numel, view.pixels), std::max<int64_t>(1, kGrainElements / view.pixels),
           [&](int64_t begin, int64_t end) { kernels.take_planes(packed, view, begin, end, values); });
}

#define SWAT_INSTANTIATE(T)                                                                                       \
  template T kth_magnitude(const KernelTable&, const Parallel&, const T*, int64_t, int64_t);                      \
  template void compress(const KernelTable&, const Parallel&, const PlanesView<const T>&, T, uint64_t*, int64_t*, \
                         const std::function<T*(int64_t)>&);                                                      \
  template void decompress(const KernelTable&, const Parallel&, const PackedView<T>&, const PlanesView<T>&);      \
  template void take(const KernelTable&, const Parallel&, const PackedView<T>&, const PlanesView<const T>&, T*);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
#undef SWAT_INSTANTIATE

}  // namespace swat::cpu
