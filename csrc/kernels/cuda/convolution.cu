// Sparse-weight convolution and its input gradient (gather.h says how one kernel serves both).
//
// A block computes 256 output pixels of 64 rows. Channels pass through shared memory a few at a time; a warp walks the lists of
// its 8 rows, each entry multiplies the same weight with 256 pixels, 8 a lane, and the sums stay in registers until the end. One
// read of shared memory a multiplication is the limit of this scheme.
#include "launchers.h"
#include "weight_list.cuh"

namespace swat::cuda {
namespace {

template <typename T>
struct GatherParams {
  ImageView<const T> input;
  ImageView<T> output;
  const T* bias;
  GatherAxis rows_axis, columns_axis;
  GatherPlan plan;
  int64_t groups, rows, channels;  // rows and channels of one group
  const int32_t* starts;           // list of row r: starts[r * channels] to starts[(r + 1) * channels]
  const GatherEntry<T>* entries;
};

// Copies channels [first, first + count) of a tile's input to shared memory, zeros where it is outside of the image.
template <typename T>
__device__ inline void stage(const GatherParams<T>& p, Compute<T>* patch, int64_t channel, int count, int sample,
                             int row, int column) {
  const int width = static_cast<int>(p.plan.patch_width), height = static_cast<int>(p.plan.patch_height);
  const int positions = static_cast<int>(p.plan.tile_samples) * height * width, step = static_cast<int>(p.plan.patch);
  // Neighbouring threads read neighbours in memory: pixels, or in channels_last channels.
  const bool by_channel = p.input.channel_stride == 1 && p.input.column_stride != 1;
  const int lanes = by_channel ? kWarp : 1;
  const int first_channel = by_channel ? lane_id() : 0;
  for (int at = threadIdx.x / lanes; at < positions; at += kGatherThreads / lanes) {
    const int x = at % width, y = at / width % height, n = at / width / height;
    const bool inside = sample + n < p.input.batch && row + y >= 0 && row + y < p.input.height && column + x >= 0 &&
                        column + x < p.input.width;
    const T* const from = p.input.data + (sample + n) * p.input.batch_stride + (row + y) * p.input.row_stride +
                          (column + x) * p.input.column_stride + channel * p.input.channel_stride;
#pragma unroll 4
    for (int c = first_channel; c < count; c += lanes) {
      patch[c * step + at] = inside ? load(from[c * p.input.channel_stride]) : Compute<T>{0};
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kGatherThreads, 2) gather_tiles(GatherParams<T> p) {
  using C = Compute<T>;
  constexpr int kRows = gather_rows<T>();
  SWAT_DYNAMIC_SHARED(shared);
  C* const patch = reinterpret_cast<C*>(shared);

  // Blocks of one tile follow each other: they read the same input. (32 bits: a 64-bit division costs registers.)
  const uint32_t row_blocks = static_cast<uint32_t>(ceil_div(p.rows, kRows * kGatherWarps));
  const uint32_t groups = static_cast<uint32_t>(p.groups), tiles_w = static_cast<uint32_t>(p.plan.tiles_w);
  const uint32_t tiles_h = static_cast<uint32_t>(p.plan.tiles_h);
  uint32_t unit = blockIdx.x;
  const int row_block = static_cast<int>(unit % row_blocks);
  unit /= row_blocks;
  const int group = static_cast<int>(unit % groups);
  unit /= groups;
  const int tile_x = static_cast<int>(unit % tiles_w) * static_cast<int>(p.plan.tile_width);
  unit /= tiles_w;
  const int tile_y = static_cast<int>(unit % tiles_h) * static_cast<int>(p.plan.tile_height);
  const int tile_n = static_cast<int>(unit / tiles_h) * static_cast<int>(p.plan.tile_samples);

  const int tile_width = static_cast<int>(p.plan.tile_width), tile_height = static_cast<int>(p.plan.tile_height);
  const int tile_pixels = static_cast<int>(p.plan.tile_samples) * tile_height * tile_width;
  const int patch_width = static_cast<int>(p.plan.patch_width);
  const int patch_area = static_cast<int>(p.plan.patch_height) * patch_width;
  int base[kGatherPixels];
#pragma unroll
  for (int q = 0; q < kGatherPixels; ++q) {
    const int pixel = q * kWarp + lane_id();
    const int x = pixel % tile_width, y = pixel / tile_width % tile_height, n = pixel / tile_width / tile_height;
    // A pixel past the tile reads where the first one does, and is not written.
    base[q] = pixel < tile_pixels ? n * patch_area + y * static_cast<int>(p.rows_axis.step) * patch_width +
                                        x * static_cast<int>(p.columns_axis.step)
                                  : 0;
  }

  // Rows and channels of all groups are fewer than weights, which 32 bits count.
  const int rows = static_cast<int>(p.rows), channels = static_cast<int>(p.channels);
  const int first_row = (row_block * kGatherWarps + static_cast<int>(threadIdx.x) / kWarp) * kRows;
  int cursor[kRows];
  C sums[kRows][kGatherPixels];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = group * rows + first_row + r;
    const bool exists = first_row + r < rows;
    cursor[r] = exists ? p.starts[row * channels] : 0;
    const C start = exists && p.bias != nullptr ? load(p.bias[row]) : C{0};
#pragma unroll
    for (int q = 0; q < kGatherPixels; ++q) sums[r][q] = start;
  }

  const int step = static_cast<int>(p.plan.patch);
  for (int channel = 0; channel < channels; channel += static_cast<int>(p.plan.block_channels)) {
    const int left = channels - channel;
    const int count = left < p.plan.block_channels ? left : static_cast<int>(p.plan.block_channels);
    __syncthreads();  // the last channels are still being read
    stage(p, patch, static_cast<int64_t>(group) * channels + channel, count, tile_n,
          tile_y * static_cast<int>(p.rows_axis.step) + static_cast<int>(p.rows_axis.lowest),
          tile_x * static_cast<int>(p.columns_axis.step) + static_cast<int>(p.columns_axis.lowest));
    __syncthreads();
    const int shift = channel * step, limit = shift + count * step;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int end = first_row + r < rows ? p.starts[(group * rows + first_row + r + 1) * channels] : 0;
      for (;;) {
        // 32 entries at once, then one after the other by all lanes.
        const int at = cursor[r] + lane_id();
        GatherEntry<T> entry{C{0}, 0};
        if (at < end) entry = p.entries[at];
        // Lists are in the order of channels, so those of this block come first.
        const int ready = count_bits(__ballot_sync(kAllLanes, at < end && entry.offset < limit));
        for (int i = 0; i < ready; ++i) {
          const C weight = __shfl_sync(kAllLanes, entry.weight, i);
          const C* const pixels = patch + (__shfl_sync(kAllLanes, entry.offset, i) - shift);
#pragma unroll
          for (int q = 0; q < kGatherPixels; ++q) sums[r][q] += weight * pixels[base[q]];
        }
        cursor[r] += ready;
        if (ready < kWarp) break;
      }
    }
  }

  const int width = recomputed(tile_width);
#pragma unroll
  for (int q = 0; q < kGatherPixels; ++q) {
    const int pixel = q * kWarp + lane_id();
    const int x = tile_x + pixel % width, y = tile_y + pixel / width % tile_height,
              n = tile_n + pixel / width / tile_height;
    if (pixel >= tile_pixels || x >= p.output.width || y >= p.output.height || n >= p.output.batch) continue;
    T* const to = p.output.data + n * p.output.batch_stride + y * p.output.row_stride + x * p.output.column_stride +
                  (static_cast<int64_t>(group) * rows + first_row) * p.output.channel_stride;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row + r < rows) to[r * p.output.channel_stride] = store<T>(sums[r][q]);
    }
  }
}

// For kernels so wide that not one pixel's input fits in shared memory: a thread computes one output.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads) gather_direct(GatherParams<T> p) {
  const uint32_t width = static_cast<uint32_t>(p.output.width), height = static_cast<uint32_t>(p.output.height);
  const uint32_t outputs = static_cast<uint32_t>(p.output.channels) * height * width,
                 blocks = ceil_div(outputs, kGatherThreads);
  const uint32_t index = blockIdx.x % blocks * kGatherThreads + threadIdx.x;
  if (index >= outputs) return;
  const int64_t n = blockIdx.x / blocks, row = index / width / height, y = index / width % height, x = index % width;
  const int32_t columns = static_cast<int32_t>(p.columns_axis.taps),
                taps = static_cast<int32_t>(p.rows_axis.taps) * columns;
  const T* const image =
      p.input.data + n * p.input.batch_stride +
      static_cast<uint32_t>(row) / static_cast<uint32_t>(p.rows) * p.channels * p.input.channel_stride;
  Compute<T> sum = p.bias != nullptr ? load(p.bias[row]) : Compute<T>{0};
  for (int32_t at = p.starts[row * p.channels]; at < p.starts[(row + 1) * p.channels]; ++at) {
    const GatherEntry<T> entry = p.entries[at];
    const int32_t tap = entry.offset % taps;
    const int64_t from_y = y * p.rows_axis.step + p.rows_axis.coordinate(tap / columns);
    const int64_t from_x = x * p.columns_axis.step + p.columns_axis.coordinate(tap % columns);
    if (from_y < 0 || from_y >= p.input.height || from_x < 0 || from_x >= p.input.width) continue;
    sum += entry.weight * load(image[entry.offset / taps * p.input.channel_stride + from_y * p.input.row_stride +
                                     from_x * p.input.column_stride]);
  }
  p.output.data[n * p.output.batch_stride + row * p.output.channel_stride + y * p.output.row_stride +
                x * p.output.column_stride] = store<T>(sum);
}

// A 1x1 convolution without stride sees no neighbours: join axes that lie evenly in both images, so that no tile is cut short.
template <typename T>
void join_axes(GatherParams<T>& p) {
  for (const GatherAxis* axis : {&p.rows_axis, &p.columns_axis}) {
    if (axis->taps != 1 || axis->step != 1 || axis->stride != 1 || axis->lowest != 0 || axis->inputs != axis->outputs)
      return;
  }
  auto& in = p.input;
  auto& out = p.output;
  if (in.row_stride != in.width * in.column_stride || out.row_stride != out.width * out.column_stride) return;
  auto join_rows = [](auto& image) {
    image.width *= image.height;
    image.height = 1;
    image.row_stride = image.width * image.column_stride;
  };
  join_rows(in);
  join_rows(out);
  if (in.batch_stride == in.row_stride && out.batch_stride == out.row_stride) {
    auto join_batch = [](auto& image) {
      image.width *= image.batch;
      image.batch = 1;
      image.row_stride = image.batch_stride = image.width * image.column_stride;
    };
    join_batch(in);
    join_batch(out);
  }
  p.rows_axis.inputs = p.rows_axis.outputs = out.height;
  p.columns_axis.inputs = p.columns_axis.outputs = out.width;
}

template <typename T>
cudaError_t run_gather(GatherParams<T> p, const PackedView<T>& weight, bool backward, void* scratch,
                       cudaStream_t stream) {
  if (p.output.numel() == 0) return cudaSuccess;
  join_axes(p);
  p.plan = plan_gather(p.output.batch, p.rows_axis, p.columns_axis, p.channels, sizeof(Compute<T>));
  WeightListParams<T> lists{weight,   p.rows_axis,  p.columns_axis,     p.groups, p.rows, p.channels,
                            backward, p.plan.patch, p.plan.patch_width, nullptr,  nullptr};
  SWAT_TRY(build_lists(lists, scratch, stream));
  p.starts = lists.starts;
  p.entries = lists.entries;
  if (p.plan.direct) {
    const int64_t outputs = p.output.channels * p.output.height * p.output.width;
    if (outputs > INT32_MAX) return cudaErrorInvalidValue;
    SWAT_LAUNCH(gather_direct<T>, p.output.batch * ceil_div(outputs, kGatherThreads), kGatherThreads, 0, stream, p);
  } else {
    const int64_t blocks = p.plan.tiles() * p.groups * ceil_div(p.rows, gather_rows<T>() * kGatherWarps);
    SWAT_LAUNCH(gather_tiles<T>, blocks, kGatherThreads, p.plan.block_channels * p.plan.patch * sizeof(Compute<T>),
                stream, p);
  }
  return cudaGetLastError();
}

// Entries hold 32-bit offsets and counts.
template <typename T>
bool too_large(const ConvGeometry& g, const PackedView<T>& weight) {
  return weight.numel > INT32_MAX || g.group_in() * g.taps() > INT32_MAX || g.group_out() * g.taps() > INT32_MAX;
}

}  // namespace

template <typename T>
size_t convolution_scratch(const ConvolutionParams<T>& p) {
  return WeightListScratch<T>(p.geometry.out_channels * p.geometry.group_in(), p.weight.capacity).total();
}

template <typename T>
cudaError_t convolution(const ConvolutionParams<T>& p, cudaStream_t stream) {
  const ConvGeometry& g = p.geometry;
  if (too_large(g, p.weight)) return cudaErrorInvalidValue;
  GatherParams<T> gather{};
  gather.input = p.input;
  gather.output = p.output;
  gather.bias = p.bias;
  gather.rows_axis =
      forward_axis(g.in_height, g.out_height, g.kernel_height, g.stride_height, g.dilation_height, g.pad_top);
  gather.columns_axis =
      forward_axis(g.in_width, g.out_width, g.kernel_width, g.stride_width, g.dilation_width, g.pad_left);
  gather.groups = g.groups;
  gather.rows = g.group_out();
  gather.channels = g.group_in();
  return run_gather(gather, p.weight, false, p.scratch, stream);
}

template <typename T>
size_t convolution_input_grad_scratch(const InputGradParams<T>& p) {
  return WeightListScratch<T>(p.geometry.in_channels * p.geometry.group_out(), p.weight.capacity).total();
}

template <typename T>
cudaError_t convolution_input_grad(const InputGradParams<T>& p, cudaStream_t stream) {
  const ConvGeometry& g = p.geometry;
  if (too_large(g, p.weight)) return cudaErrorInvalidValue;
  for (int64_t i = 0; i < (g.stride_height < g.in_height ? g.stride_height : g.in_height); ++i) {
    for (int64_t j = 0; j < (g.stride_width < g.in_width ? g.stride_width : g.in_width); ++j) {
      GatherParams<T> gather{};
      gather.input = p.grad_output;
      gather.output = p.grad_input;
      gather.rows_axis =
          backward_axis(g.out_height, g.in_height, g.kernel_height, g.stride_height, g.dilation_height, g.pad_top, i);
      gather.columns_axis =
          backward_axis(g.out_width, g.in_width, g.kernel_width, g.stride_width, g.dilation_width, g.pad_left, j);
      gather.output.data += i * gather.output.row_stride + j * gather.output.column_stride;
      gather.output.height = gather.rows_axis.outputs;
      gather.output.width = gather.columns_axis.outputs;
      gather.output.row_stride *= g.stride_height;
      gather.output.column_stride *= g.stride_width;
      gather.groups = g.groups;
      gather.rows = g.group_in();
      gather.channels = g.group_out();
      SWAT_TRY(run_gather(gather, p.weight, true, p.scratch, stream));
    }
  }
  return cudaGetLastError();
}

#define SWAT_INSTANTIATE(T)                                                    \
  template size_t convolution_scratch(const ConvolutionParams<T>&);            \
  template cudaError_t convolution(const ConvolutionParams<T>&, cudaStream_t); \
  template size_t convolution_input_grad_scratch(const InputGradParams<T>&);   \
  template cudaError_t convolution_input_grad(const InputGradParams<T>&, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
