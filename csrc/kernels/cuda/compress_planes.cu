// Two passes over a channels_last tensor: bits, the number of them before each 1024, values.
//
// A lane owns a channel, so that 32 lanes read 32 neighbours, and collects the bits of 32 pixels; those lie across words of the
// bitmap where the image is no multiple of 32, and are then joined with an integer atomic, whose order cannot be seen.
#include "compress_planes.h"

#include "bits.h"
#include "layout.h"
#include "look_back.cuh"

namespace swat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ inline int64_t warp_of_grid() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

// 32 channels times 32 pixels, seen by a warp: its lane's channel, and where its pixels are.
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

// The rank directory and the number of all bits: a thread has 1024 elements, which its warp counts together.
__global__ void __launch_bounds__(kThreads) rank_blocks(const uint32_t* halves, int64_t numel, int64_t* ranks,
                                                        int64_t* kept, uint64_t* scratch, const int32_t* condition) {
  SWAT_SHARED(sums, int[kWarp + 1]);
  if (skipped(condition)) return;
  const int64_t tile = next_tile(scratch), block = tile * kThreads + threadIdx.x;
  int count = 0, total;
  for (int i = 0; i < kWarp; ++i) {
    const int64_t half = (block - lane_id() + i) * kBlockHalves + lane_id();
    const int found = warp_sum(half < 2 * word_count(numel) ? count_bits(halves[half]) : 0);
    if (lane_id() == i) count = found;
  }
  const int within = block_exclusive(count, sums, &total);
  const int64_t before = block_look_back(scratch, tile, total);
  if (block < block_count(numel)) ranks[block] = before + within;
  if (tile + 1 == gridDim.x && threadIdx.x == 0) *kept = before + total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) collect_channels(CompressParams<T> p, int64_t pixel_step, int64_t numel) {
  if (skipped(p.condition)) return;
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

}  // namespace

size_t compress_planes_scratch(int64_t numel) { return look_back_scratch(ceil_div(block_count(numel), kThreads)); }

template <typename T>
cudaError_t compress_planes(const CompressParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.input.numel(), halves = 2 * word_count(numel), pixel_step = pixel_stride(p.input);
  const int64_t units = ceil_div(channel_units(p.input), kWarps);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(p.words);
  SWAT_LAUNCH(clear_bits, ceil_div(halves, kThreads), kThreads, 0, stream, bits, halves, p.condition);
  SWAT_LAUNCH(mark_channels<T>, units, kThreads, 0, stream, p.input, pixel_step, p.threshold, bits, p.condition);
  SWAT_TRY(cudaMemsetAsync(p.scratch, 0, compress_planes_scratch(numel), stream));
  SWAT_LAUNCH(rank_blocks, ceil_div(block_count(numel), kThreads), kThreads, 0, stream, bits, numel, p.ranks, p.kept,
              static_cast<uint64_t*>(p.scratch), p.condition);
  if (p.capacity > 0) SWAT_LAUNCH(collect_channels<T>, units, kThreads, 0, stream, p, pixel_step, numel);
  return cudaGetLastError();
}

template cudaError_t compress_planes(const CompressParams<float>&, cudaStream_t);
template cudaError_t compress_planes(const CompressParams<double>&, cudaStream_t);
template cudaError_t compress_planes(const CompressParams<BFloat16>&, cudaStream_t);
template cudaError_t compress_planes(const CompressParams<Half>&, cudaStream_t);

}  // namespace swat::cuda
