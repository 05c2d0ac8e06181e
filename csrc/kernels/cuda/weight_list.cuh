// A packed weight as lists of (value, place): one list a row of the gather, in the order of channels. Built on the device, since
// nothing but the device knows how many weights are kept, in one pass: a block counts what its slices hold, learns from the blocks
// before it where its entries go (look_back.cuh), and writes them.
#pragma once

#include "bits.h"
#include "gather.h"
#include "look_back.cuh"

namespace swat::cuda {

inline constexpr int kListThreads = 256;

template <typename T>
struct WeightListParams {
  PackedView<T> weight;
  GatherAxis rows_axis, columns_axis;
  int64_t groups, rows, channels;  // rows and channels of one group
  bool backward;                   // rows are the weight's input channels
  int64_t patch, patch_width;      // patch 0: places for the direct kernel
  int32_t* starts;                 // [groups * rows * channels + 1]: where each (row, channel) starts
  GatherEntry<T>* entries;
};

// f(value's rank, tap) for each kept weight of (row, channel) whose tap is present, taps in order.
template <typename T, typename F>
__device__ inline void each_tap(const WeightListParams<T>& p, int64_t unit, bool ranked, F f) {
  const int64_t channel = unit % p.channels, row = unit / p.channels % p.rows, group = unit / p.channels / p.rows;
  const int64_t taps = p.rows_axis.taps * p.columns_axis.taps;
  const int64_t slice =
      p.backward ? (group * p.channels + channel) * p.rows + row : (group * p.rows + row) * p.channels + channel;
  int64_t rank = ranked ? rank_before(p.weight.words, p.weight.ranks, slice * taps) : 0;
  for (int64_t first = 0; first < taps; first += 32) {
    uint32_t bits = bits_at(p.weight.words, p.weight.numel, slice * taps + first) &
                    low_bits(static_cast<int>(taps - first < 32 ? taps - first : 32));
    for (; bits != 0; bits &= bits - 1, ++rank) {
      const int64_t tap = first + count_bits(~bits & (bits - 1));
      if (p.rows_axis.present(tap / p.columns_axis.taps) && p.columns_axis.present(tap % p.columns_axis.taps))
        f(rank, tap);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kListThreads) make_lists(WeightListParams<T> p, uint64_t* scratch) {
  SWAT_SHARED(sums, int[kWarp + 1]);
  const int64_t tile = next_tile(scratch), unit = tile * kListThreads + threadIdx.x;
  const int64_t units = p.groups * p.rows * p.channels;
  int count = 0, total;
  if (unit < units) each_tap(p, unit, false, [&](int64_t, int64_t) { ++count; });
  const int within = block_exclusive(count, sums, &total);
  const int64_t rank = block_look_back(scratch, tile, total);
  if (unit >= units) return;
  int32_t at = static_cast<int32_t>(rank) + within;
  p.starts[unit] = at;
  if (unit + 1 == units) p.starts[units] = at + count;
  if (count == 0) return;
  const int64_t channel = unit % p.channels, taps = p.rows_axis.taps * p.columns_axis.taps;
  each_tap(p, unit, true, [&](int64_t value, int64_t tap) {
    int64_t offset = channel * taps + tap;
    if (p.patch != 0) {
      offset = channel * p.patch +
               (p.rows_axis.coordinate(tap / p.columns_axis.taps) - p.rows_axis.lowest) * p.patch_width +
               p.columns_axis.coordinate(tap % p.columns_axis.taps) - p.columns_axis.lowest;
    }
    p.entries[at++] = {load(p.weight.values[value]), static_cast<int32_t>(offset)};
  });
}

// Bytes of scratch, in this order: that of the look-back, starts, entries.
template <typename T>
struct WeightListScratch {
  size_t states, starts, entries;

  WeightListScratch(int64_t units, int64_t kept)
      : states(round_up(look_back_scratch(ceil_div(units, kListThreads)))),
        starts(round_up((units + 1) * sizeof(int32_t))),
        entries(round_up(kept * sizeof(GatherEntry<T>))) {}
  size_t total() const { return states + starts + entries; }
  static size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }
};

template <typename T>
cudaError_t build_lists(WeightListParams<T>& p, void* scratch, cudaStream_t stream) {
  const int64_t units = p.groups * p.rows * p.channels;
  const WeightListScratch<T> bytes(units, p.weight.capacity);
  unsigned char* const memory = static_cast<unsigned char*>(scratch);
  p.starts = reinterpret_cast<int32_t*>(memory + bytes.states);
  p.entries = reinterpret_cast<GatherEntry<T>*>(memory + bytes.states + bytes.starts);
  SWAT_TRY(cudaMemsetAsync(scratch, 0, bytes.states, stream));
  SWAT_LAUNCH(make_lists<T>, ceil_div(units, kListThreads), kListThreads, 0, stream, p,
              static_cast<uint64_t*>(scratch));
  return cudaGetLastError();
}

}  // namespace swat::cuda
