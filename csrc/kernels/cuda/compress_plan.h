// How compress cuts a tensor in tiles, each of which one block reads once.
//
// A tile is a run of elements in logical order, so that what it keeps is a run of `values`. Contiguous, strided: so many elements.
// Channels last: whole planes of neighbouring channels, enough of them that a pixel's channels fill a sector of 32 bytes, or a line
// where planes are small. A tile's bits and what it keeps wait in shared memory for the number of elements kept before the tile;
// where a tile of planes keeps more than fits, the rest is read again. Planes too large for that take two passes over the tensor:
// compress_planes.cu.
//
// Bytes moved for n elements of s bytes and c values, without what caches spare:
//   least       n s + c s + n (1/8 + 1/128)   input, values, bitmap and ranks
//   one pass    least + 32 t + r s            t tiles, a state of 8 bytes each: cleared, written twice, read; r values read again
//   two passes  least + 32 q + n / 2          q of the n s / 32 sectors keep an element; the bitmap is cleared, joined, counted and
//                                             read again
#pragma once

#include "bits.h"
#include "layout.h"

namespace swat::cuda {

inline constexpr int kPackThreads = 256;
inline constexpr int kPackWarps = kPackThreads / kWarp;
inline constexpr int kSectorBytes = 32, kLineBytes = 128;
inline constexpr int kPackShared = 46 << 10;       // bytes, below the 48 KiB that need no asking
inline constexpr int kRunTileBytes = 32 << 10;     // of a tile of a run of elements; all of it fits in shared memory
inline constexpr int kPlaneTileBytes = 16 << 10;   // of a tile of planes; small, so that there are many
inline constexpr int kLineTileBytes = 64 << 10;    // where it takes more to fill a line
inline constexpr int kMostTileBytes = 100 << 10;   // where it takes more to fill a sector: 98 KiB for 56 x 56 pixels
inline constexpr int kMostUnits = 4096;            // of a tile
inline constexpr int kLeastSampleBytes = 2 << 10;  // smaller samples are taken as strided

// A unit is what one thread reads of a tile of planes: up to 32 pixels of one channel, bits of one word.
struct PackPlan {
  Layout layout;
  bool two_passes;
  int64_t tiles;
  int64_t slabs;      // tiles of a sample
  int tile_channels;  // at most
  int tile_elements;  // at most
  int units;          // places of tiles of planes
  int halves;         // 32 bits each
  int staged;         // values that fit

  size_t shared(size_t value_bytes) const {
    return staged * value_bytes + halves * (sizeof(uint32_t) + sizeof(int32_t)) + units * sizeof(uint16_t);
  }
};

template <typename T>
PackPlan pack_plan(const ImageView<const T>& input) {
  constexpr int kBytes = sizeof(T);
  const int64_t pixels = input.height * input.width, runs = ceil_div(pixels, 32);
  PackPlan plan{};
  plan.layout = layout_of(input);
  if (plan.layout == Layout::channels_last && input.channels * pixels * kBytes < kLeastSampleBytes) {
    plan.layout = Layout::strided;
  }
  if (plan.layout != Layout::channels_last) {
    plan.tile_elements = kRunTileBytes / kBytes;
    plan.tiles = ceil_div(input.numel(), plan.tile_elements);
    plan.halves = plan.tile_elements / 32;
    plan.staged = plan.tile_elements;
    return plan;
  }
  int64_t channels = kSectorBytes / kBytes;
  while (channels < input.channels && 2 * channels * runs <= kMostUnits &&
         2 * channels * pixels * kBytes <= (channels * kBytes < kLineBytes ? kLineTileBytes : kPlaneTileBytes)) {
    channels *= 2;
  }
  if (channels > input.channels) channels = input.channels;
  plan.slabs = ceil_div(input.channels, channels);
  plan.tiles = input.batch * plan.slabs;
  plan.two_passes = channels * pixels * kBytes > kMostTileBytes;
  if (plan.two_passes) return plan;
  plan.tile_channels = static_cast<int>(channels);
  plan.tile_elements = static_cast<int>(channels * pixels);
  plan.units = static_cast<int>(channels * runs);
  plan.halves = plan.tile_elements / 32 + 3;  // a tile may start and end within a word, and one is read past the last
  plan.staged = static_cast<int>((kPackShared - plan.shared(kBytes)) / kBytes);
  if (plan.staged > plan.tile_elements) plan.staged = plan.tile_elements;
  plan.staged = static_cast<int>(ceil_div(plan.staged, 8) * 8);  // what follows in shared memory is aligned
  return plan;
}

}  // namespace swat::cuda
