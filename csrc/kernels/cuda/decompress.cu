// From the packed form to a dense tensor. Contiguous: a warp writes 1024 elements, 32 at a time. Other layouts: 32 channels times
// 128 pixels are turned in shared memory, so that both reads and writes are of neighbours.
#include "expand.cuh"
#include "launchers.h"
#include "layout.h"

namespace swat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileChannels = 32;
constexpr int kTilePixels = 128;

template <typename T, bool kStrided>
__global__ void __launch_bounds__(kThreads) restore_blocks(DecompressParams<T> p) {
  const int64_t block = p.begin / kBlockBits + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t end = p.begin + p.output.numel();
  if (block * kBlockBits >= end) return;
  const int64_t half = block * kBlockHalves + lane_id();
  const uint32_t mine =
      half < 2 * word_count(p.packed.numel) ? reinterpret_cast<const uint32_t*>(p.packed.words)[half] : 0;
  const int before = warp_exclusive(count_bits(mine));
  const T* const values = p.packed.values + p.packed.ranks[block];
#pragma unroll 8
  for (int i = 0; i < kBlockHalves; ++i) {
    const uint32_t bits = __shfl_sync(kAllLanes, mine, i);
    const int start = __shfl_sync(kAllLanes, before, i);
    const int64_t index = block * kBlockBits + i * 32 + lane_id();
    if (index >= p.begin && index < end) {
      const bool kept = bits >> lane_id() & 1;
      p.output.data[kStrided ? offset_of(p.output, index - p.begin) : index - p.begin] =
          kept ? values[start + count_bits(bits & low_bits(lane_id()))] : from_bits<T>(0);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) restore_channels(DecompressParams<T> p, int64_t pixel_step) {
  // One element more a row: a column then meets every bank.
  SWAT_SHARED(tile, T[kTileChannels][kTilePixels + 1]);
  const ImageView<T>& out = p.output;
  const int64_t pixels = out.height * out.width;
  const int64_t runs = ceil_div(pixels, kTilePixels), slabs = ceil_div(out.channels, kTileChannels);
  const int64_t unit = blockIdx.x;
  const int64_t channel = unit % slabs * kTileChannels, pixel = unit / slabs % runs * kTilePixels,
                sample = unit / slabs / runs;
  const int length = static_cast<int>(pixels - pixel < kTilePixels ? pixels - pixel : kTilePixels);
  const int channels =
      static_cast<int>(out.channels - channel < kTileChannels ? out.channels - channel : kTileChannels);
  for (int c = threadIdx.x / kWarp; c < channels; c += kWarps) {
    expand_run(p.packed, p.begin + (sample * out.channels + channel + c) * pixels + pixel, length,
               [&](int i, T value) { tile[c][i] = value; });
  }
  __syncthreads();
  T* const corner = out.data + sample * out.batch_stride + channel + pixel * pixel_step;
  for (int i = threadIdx.x / kTileChannels; i < length; i += kThreads / kTileChannels) {
    const int c = threadIdx.x % kTileChannels;
    if (c < channels) corner[i * pixel_step + c] = tile[c][i];
  }
}

}  // namespace

template <typename T>
cudaError_t decompress(const DecompressParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.output.numel();
  if (numel == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(block_count(p.begin + numel) - p.begin / kBlockBits, kWarps);
  switch (layout_of(p.output)) {
    case Layout::contiguous:
      SWAT_LAUNCH((restore_blocks<T, false>), blocks, kThreads, 0, stream, p);
      break;
    case Layout::strided:
      SWAT_LAUNCH((restore_blocks<T, true>), blocks, kThreads, 0, stream, p);
      break;
    case Layout::channels_last: {
      const int64_t pixels = p.output.height * p.output.width;
      const int64_t units = p.output.batch * ceil_div(pixels, kTilePixels) * ceil_div(p.output.channels, kTileChannels);
      SWAT_LAUNCH(restore_channels<T>, units, kThreads, 0, stream, p, pixel_stride(p.output));
      break;
    }
  }
  return cudaGetLastError();
}

template cudaError_t decompress(const DecompressParams<float>&, cudaStream_t);
template cudaError_t decompress(const DecompressParams<double>&, cudaStream_t);
template cudaError_t decompress(const DecompressParams<BFloat16>&, cudaStream_t);
template cudaError_t decompress(const DecompressParams<Half>&, cudaStream_t);

}  // namespace swat::cuda
