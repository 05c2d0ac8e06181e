// Exclusive prefix sums in place over an array on the device, in three launches: sums of tiles, their scan, the tiles' own scans.
#pragma once

#include "warp.cuh"

namespace swat::cuda {

inline constexpr int kScanThreads = 256;
inline constexpr int kScanItems = 8;
inline constexpr int kScanTile = kScanThreads * kScanItems;

template <typename V>
__global__ void __launch_bounds__(kScanThreads)
    scan_tile_sums(const V* data, int64_t count, V* sums, const int32_t* condition) {
  __shared__ V shared[kWarp + 1];
  if (skipped(condition)) return;
  V sum = 0;
  for (int i = 0; i < kScanItems; ++i) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kScanTile + i * kScanThreads + threadIdx.x;
    if (at < count) sum += data[at];
  }
  V total;
  block_exclusive(sum, shared, &total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

template <typename V>
__global__ void __launch_bounds__(kScanThreads)
    scan_sums(V* sums, int64_t tiles, V* total_out, const int32_t* condition) {
  __shared__ V shared[kWarp + 1];
  if (skipped(condition)) return;
  V before = 0;
  for (int64_t first = 0; first < tiles; first += kScanThreads) {
    const int64_t at = first + threadIdx.x;
    V total;
    const V offset = block_exclusive(at < tiles ? sums[at] : V{0}, shared, &total);
    if (at < tiles) sums[at] = before + offset;
    before += total;
  }
  if (threadIdx.x == 0) *total_out = before;
}

template <typename V>
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles(V* data, int64_t count, const V* sums, const int32_t* condition) {
  __shared__ V shared[kWarp + 1];
  if (skipped(condition)) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScanTile + threadIdx.x * kScanItems;
  V items[kScanItems];
  V sum = 0;
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    items[i] = first + i < count ? data[first + i] : V{0};
    sum += items[i];
  }
  V total;
  V before = sums[blockIdx.x] + block_exclusive(sum, shared, &total);
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    if (first + i < count) data[first + i] = before;
    before += items[i];
  }
}

template <typename V>
size_t scan_scratch(int64_t count) {
  return ceil_div(count, kScanTile) * sizeof(V);
}

// data[i] = sum of what was in data[0..i), *total = sum of all; both on the device. count > 0.
template <typename V>
cudaError_t scan(V* data, int64_t count, V* total, void* scratch, const int32_t* condition, cudaStream_t stream) {
  const int64_t tiles = ceil_div(count, kScanTile);
  V* const sums = static_cast<V*>(scratch);
  SWAT_LAUNCH(scan_tile_sums<V>, tiles, kScanThreads, 0, stream, data, count, sums, condition);
  SWAT_LAUNCH(scan_sums<V>, 1, kScanThreads, 0, stream, sums, tiles, total, condition);
  SWAT_LAUNCH(scan_tiles<V>, tiles, kScanThreads, 0, stream, data, count, sums, condition);
  return cudaGetLastError();
}

}  // namespace swat::cuda
