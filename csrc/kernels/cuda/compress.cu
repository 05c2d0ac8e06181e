// From a tensor to its packed form, in steps: bits, counts of each 1024, their prefix sums, values.
//
// Contiguous tensors: a warp owns 1024 elements, reads them 32 at a time, and a ballot is 32 bits of the bitmap. Channels last: a
// lane owns a channel, so that 32 lanes read 32 neighbours, and collects the bits of 32 pixels; those lie across words of the
// bitmap where the image is no multiple of 32, and are then joined with an integer atomic, whose order cannot be seen.
#include "bits.h"
#include "launchers.h"
#include "layout.h"
#include "scan.cuh"

namespace swat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ inline int64_t warp_of_grid() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

// 32 channels times 32 pixels, seen by a warp of the channels_last kernels: its lane's channel, and where its pixels are.
struct ChannelRun {
  bool exists;
  int64_t index;   // logical index of the first pixel
  int64_t offset;  // in memory
  int pixels;      // 1..32
};

template <typename T>
__device__ inline ChannelRun channel_run(const ImageView<T>& image, int64_t pixel_step, int64_t unit) {
  const int64_t pixels = image.height * image.width;
  const int64_t runs = ceil_div(pixels, 32), slabs = ceil_div(image.channels, kWarp);
  // Neighbouring warps take neighbouring channels, so that what they read lies together.
  const int64_t channel = unit % slabs * kWarp + lane_id(), run = unit / slabs % runs, sample = unit / slabs / runs;
  ChannelRun found;
  found.exists = sample < image.batch && channel < image.channels;
  found.index = (sample * image.channels + channel) * pixels + run * 32;
  found.offset = sample * image.batch_stride + channel + run * 32 * pixel_step;
  const int64_t left = pixels - run * 32;
  found.pixels = static_cast<int>(left < 32 ? left : 32);
  return found;
}

template <typename T>
int64_t channel_units(const ImageView<T>& image) {
  return image.batch * ceil_div(image.height * image.width, 32) * ceil_div(image.channels, kWarp);
}

template <typename T, bool kStrided>
__global__ void __launch_bounds__(kThreads) mark_blocks(ImageView<const T> input, int64_t numel, const T* threshold,
                                                        uint32_t* halves, const int32_t* condition) {
  if (skipped(condition)) return;
  const int64_t block = warp_of_grid();
  if (block * kBlockBits >= numel) return;
  const Compute<T> limit = load(*threshold);
  uint32_t mine = 0;
#pragma unroll 8
  for (int i = 0; i < kBlockHalves; ++i) {
    const int64_t index = block * kBlockBits + i * 32 + lane_id();
    const bool kept = index < numel && keeps(input.data[kStrided ? offset_of(input, index) : index], limit);
    const uint32_t bits = __ballot_sync(kAllLanes, kept);
    if (lane_id() == i) mine = bits;
  }
  const int64_t half = block * kBlockHalves + lane_id();
  if (half < 2 * word_count(numel)) halves[half] = mine;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mark_channels(ImageView<const T> input, int64_t pixel_step, const T* threshold, uint32_t* halves,
                  const int32_t* condition) {
  if (skipped(condition)) return;
  const ChannelRun run = channel_run(input, pixel_step, warp_of_grid());
  if (!run.exists) return;
  const Compute<T> limit = load(*threshold);
  uint32_t bits = 0;
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    if (i < run.pixels && keeps(input.data[run.offset + i * pixel_step], limit)) bits |= 1u << i;
  }
  const int64_t half = run.index / 32;
  const int shift = static_cast<int>(run.index % 32);
  if (bits << shift != 0) atomicOr(&halves[half], bits << shift);
  if (shift != 0 && bits >> (32 - shift) != 0) atomicOr(&halves[half + 1], bits >> (32 - shift));
}

__global__ void __launch_bounds__(kThreads) clear_bits(uint32_t* halves, int64_t count, const int32_t* condition) {
  if (skipped(condition)) return;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) halves[at] = 0;
}

__global__ void __launch_bounds__(kThreads)
    count_blocks(const uint32_t* halves, int64_t numel, int64_t* counts, const int32_t* condition) {
  if (skipped(condition)) return;
  const int64_t block = warp_of_grid();
  if (block * kBlockBits >= numel) return;
  const int64_t half = block * kBlockHalves + lane_id();
  const int count = warp_sum(half < 2 * word_count(numel) ? count_bits(halves[half]) : 0);
  if (lane_id() == 0) counts[block] = count;
}

__global__ void compare(const int64_t* kept, int64_t limit, int32_t* condition) { *condition = *kept > limit; }

__global__ void __launch_bounds__(kThreads)
    trim_blocks(uint32_t* halves, int64_t* ranks, const int64_t* kept, int64_t numel, int64_t capacity) {
  const int64_t block = warp_of_grid();
  if (*kept <= capacity || block * kBlockBits >= numel) return;
  const int64_t rank = ranks[block], half = block * kBlockHalves + lane_id();
  const bool exists = half < 2 * word_count(numel);
  uint32_t bits = exists ? halves[half] : 0;
  int64_t allowed = capacity - rank - warp_exclusive(count_bits(bits));
  const int before = count_bits(bits);
  if (allowed < before) {
    // Dropping the highest set bit until few enough are left.
    for (int left = before; left > (allowed > 0 ? allowed : 0); --left) {
      uint32_t rest = bits;
      while ((rest & (rest - 1)) != 0) rest &= rest - 1;
      bits ^= rest;
    }
    if (exists) halves[half] = bits;
  }
  __syncwarp();
  if (lane_id() == 0 && rank > capacity) ranks[block] = capacity;
}

__global__ void trim_count(int64_t* kept, int64_t capacity) {
  if (*kept > capacity) *kept = capacity;
}

template <typename T, bool kStrided>
__global__ void __launch_bounds__(kThreads) collect_blocks(CollectParams<T> p, int64_t numel) {
  const int64_t block = warp_of_grid();
  if (block * kBlockBits >= numel) return;
  const int64_t half = block * kBlockHalves + lane_id();
  const uint32_t mine = half < 2 * word_count(numel) ? reinterpret_cast<const uint32_t*>(p.words)[half] : 0;
  const int before = warp_exclusive(count_bits(mine));
  const int64_t rank = p.ranks[block];
#pragma unroll 8
  for (int i = 0; i < kBlockHalves; ++i) {
    const uint32_t bits = __shfl_sync(kAllLanes, mine, i);
    const int64_t start = rank + __shfl_sync(kAllLanes, before, i);
    if (bits >> lane_id() & 1) {
      const int64_t index = block * kBlockBits + i * 32 + lane_id(),
                    to = start + count_bits(bits & low_bits(lane_id()));
      if (to < p.capacity) p.values[to] = p.input.data[kStrided ? offset_of(p.input, index) : index];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) collect_channels(CollectParams<T> p, int64_t pixel_step, int64_t numel) {
  const ChannelRun run = channel_run(p.input, pixel_step, warp_of_grid());
  if (!run.exists) return;
  const uint32_t bits = bits_at(p.words, numel, run.index) & low_bits(run.pixels);
  if (bits == 0) return;
  int64_t to = rank_before(p.words, p.ranks, run.index);
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    if (bits >> i & 1) {
      if (to < p.capacity) p.values[to] = p.input.data[run.offset + i * pixel_step];
      ++to;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) clear_tail(T* values, const int64_t* kept, int64_t capacity) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = *kept + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < capacity; at += stride) {
    values[at] = from_bits<T>(0);
  }
}

}  // namespace

template <typename T>
size_t mark_scratch(const CompressParams<T>& p) {
  return scan_scratch<int64_t>(block_count(p.input.numel()));
}

template <typename T>
cudaError_t mark(const CompressParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.input.numel();
  if (numel == 0) return cudaMemsetAsync(p.kept, 0, sizeof(int64_t), stream);
  uint32_t* const halves = reinterpret_cast<uint32_t*>(p.words);
  const int64_t blocks = ceil_div(block_count(numel), kWarps);
  switch (layout_of(p.input)) {
    case Layout::contiguous:
      SWAT_LAUNCH((mark_blocks<T, false>), blocks, kThreads, 0, stream, p.input, numel, p.threshold, halves,
                  p.condition);
      break;
    case Layout::strided:
      SWAT_LAUNCH((mark_blocks<T, true>), blocks, kThreads, 0, stream, p.input, numel, p.threshold, halves,
                  p.condition);
      break;
    case Layout::channels_last:
      SWAT_LAUNCH(clear_bits, ceil_div(2 * word_count(numel), kThreads), kThreads, 0, stream, halves,
                  2 * word_count(numel), p.condition);
      SWAT_LAUNCH(mark_channels<T>, ceil_div(channel_units(p.input), kWarps), kThreads, 0, stream, p.input,
                  pixel_stride(p.input), p.threshold, halves, p.condition);
      break;
  }
  SWAT_LAUNCH(count_blocks, blocks, kThreads, 0, stream, halves, numel, p.ranks, p.condition);
  SWAT_TRY(cudaGetLastError());
  return scan(p.ranks, block_count(numel), p.kept, p.scratch, p.condition, stream);
}

cudaError_t exceeds(const int64_t* kept, int64_t limit, int32_t* condition, cudaStream_t stream) {
  SWAT_LAUNCH(compare, 1, 1, 0, stream, kept, limit, condition);
  return cudaGetLastError();
}

cudaError_t trim(uint64_t* words, int64_t* ranks, int64_t* kept, int64_t numel, int64_t capacity, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  SWAT_LAUNCH(trim_blocks, ceil_div(block_count(numel), kWarps), kThreads, 0, stream,
              reinterpret_cast<uint32_t*>(words), ranks, kept, numel, capacity);
  SWAT_LAUNCH(trim_count, 1, 1, 0, stream, kept, capacity);
  return cudaGetLastError();
}

template <typename T>
cudaError_t collect(const CollectParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.input.numel();
  if (p.capacity == 0) return cudaSuccess;
  if (numel > 0) {
    const int64_t blocks = ceil_div(block_count(numel), kWarps);
    switch (layout_of(p.input)) {
      case Layout::contiguous:
        SWAT_LAUNCH((collect_blocks<T, false>), blocks, kThreads, 0, stream, p, numel);
        break;
      case Layout::strided:
        SWAT_LAUNCH((collect_blocks<T, true>), blocks, kThreads, 0, stream, p, numel);
        break;
      case Layout::channels_last:
        SWAT_LAUNCH(collect_channels<T>, ceil_div(channel_units(p.input), kWarps), kThreads, 0, stream, p,
                    pixel_stride(p.input), numel);
        break;
    }
  }
  const int64_t tail = ceil_div(p.capacity, 8 * kThreads);
  SWAT_LAUNCH(clear_tail<T>, tail < 1024 ? tail : 1024, kThreads, 0, stream, p.values, p.kept, p.capacity);
  return cudaGetLastError();
}

#define SWAT_INSTANTIATE(T)                                          \
  template size_t mark_scratch(const CompressParams<T>&);            \
  template cudaError_t mark(const CompressParams<T>&, cudaStream_t); \
  template cudaError_t collect(const CollectParams<T>&, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
