// Sparse-weight convolution and its input gradient (gather.h says how one kernel serves both).
//
// A block computes 256 output pixels of 64 rows. Channels pass through shared memory a few at a time; a warp walks the lists of
// its 8 rows, each entry multiplies the same weight with 256 pixels, 8 a lane, and the sums stay in registers until the end.
// Channels that none of the 64 rows reads are not copied. One read of shared memory a multiplication is the limit of this scheme.
#include <vector>

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
  const int32_t* starts;           // list of row r and channel c: starts[r * channels + c] up to the next
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
  C sums[kRows][kGatherPixels];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const C start = first_row + r < rows && p.bias != nullptr ? load(p.bias[group * rows + first_row + r]) : C{0};
#pragma unroll
    for (int q = 0; q < kGatherPixels; ++q) sums[r][q] = start;
  }

  const int step = static_cast<int>(p.plan.patch);
  for (int channel = 0; channel < channels; channel += static_cast<int>(p.plan.block_channels)) {
    const int left = channels - channel;
    const int count = left < p.plan.block_channels ? left : static_cast<int>(p.plan.block_channels);
    // Lists are in the order of channels: lane r holds where those of row r start and end in these.
    int begin = 0, end = 0;
    if (lane_id() < kRows && first_row + lane_id() < rows) {
      const int32_t* const list = p.starts + (group * rows + first_row + lane_id()) * channels + channel;
      begin = list[0];
      end = list[count];
    }
    // Also a barrier: the last channels are still being read.
    if (__syncthreads_or(begin != end) == 0) continue;
    stage(p, patch, static_cast<int64_t>(group) * channels + channel, count, tile_n,
          tile_y * static_cast<int>(p.rows_axis.step) + static_cast<int>(p.rows_axis.lowest),
          tile_x * static_cast<int>(p.columns_axis.step) + static_cast<int>(p.columns_axis.lowest));
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int stop = __shfl_sync(kAllLanes, end, r);
      for (int first = __shfl_sync(kAllLanes, begin, r); first < stop; first += kWarp) {
        // 32 entries at once, then one after the other by all lanes.
        GatherEntry<T> entry{C{0}, 0};
        if (first + lane_id() < stop) entry = p.entries[first + lane_id()];
        entry.offset -= channel * step;
        const int ready = stop - first < kWarp ? stop - first : kWarp;
        for (int i = 0; i < ready; ++i) {
          const C weight = __shfl_sync(kAllLanes, entry.weight, i);
          const C* const pixels = patch + __shfl_sync(kAllLanes, entry.offset, i);
#pragma unroll
          for (int q = 0; q < kGatherPixels; ++q) sums[r][q] += weight * pixels[base[q]];
        }
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
  if (in.height * in.width > kMostExtent || !rows_join(in) || !rows_join(out)) return;
  join_rows(in);
  join_rows(out);
  if (in.batch * in.width <= kMostExtent && in.batch_stride == in.row_stride && out.batch_stride == out.row_stride) {
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

// Whether 32 bits hold what the kernels count in them: weights, places of entries, coordinates in the padded image.
template <typename T>
bool fits(const ConvGeometry& g, const PackedView<T>& weight) {
  for (int64_t extent : {g.in_height, g.in_width, g.out_height, g.out_width, g.stride_height, g.stride_width, g.pad_top,
                         g.pad_left, g.kernel_height, g.kernel_width, g.dilation_height, g.dilation_width}) {
    if (extent > kMostExtent) return false;
  }
  return g.out_height * g.stride_height <= kMostExtent && g.out_width * g.stride_width <= kMostExtent &&
         g.kernel_height * g.dilation_height <= kMostExtent && g.kernel_width * g.dilation_width <= kMostExtent &&
         weight.numel <= INT32_MAX && g.group_in() * g.taps() <= INT32_MAX && g.group_out() * g.taps() <= INT32_MAX;
}

// The parts of one axis of an input gradient that some tap meets.
std::vector<GatherAxis> backward_axes(int64_t inputs, int64_t size, int64_t taps, int64_t stride, int64_t dilation,
                                      int64_t pad) {
  std::vector<GatherAxis> found;
  for (int64_t residue = 0; residue < stride && residue < size; ++residue) {
    const GatherAxis axis = backward_axis(inputs, size, taps, stride, dilation, pad, residue);
    if (axis.span > 0) found.push_back(axis);
  }
  return found;
}

}  // namespace

template <typename T>
size_t convolution_scratch(const ConvolutionParams<T>& p) {
  return WeightListScratch<T>(p.geometry.out_channels * p.geometry.group_in(), p.weight.capacity).total();
}

template <typename T>
cudaError_t convolution(const ConvolutionParams<T>& p, cudaStream_t stream) {
  const ConvGeometry& g = p.geometry;
  if (!fits(g, p.weight)) return cudaErrorInvalidValue;
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
  if (!fits(g, p.weight)) return cudaErrorInvalidValue;
  const std::vector<GatherAxis> rows =
      backward_axes(g.out_height, g.in_height, g.kernel_height, g.stride_height, g.dilation_height, g.pad_top);
  const std::vector<GatherAxis> columns =
      backward_axes(g.out_width, g.in_width, g.kernel_width, g.stride_width, g.dilation_width, g.pad_left);
  const int64_t parts = (g.stride_height < g.in_height ? g.stride_height : g.in_height) *
                        (g.stride_width < g.in_width ? g.stride_width : g.in_width);
  if (static_cast<int64_t>(rows.size() * columns.size()) < parts) {  // what no tap meets is zero
    SWAT_TRY(cudaMemsetAsync(p.grad_input.data, 0, p.grad_input.numel() * sizeof(T), stream));
  }
  for (const GatherAxis& row : rows) {
    for (const GatherAxis& column : columns) {
      GatherParams<T> gather{};
      gather.input = p.grad_output;
      gather.output = p.grad_input;
      gather.rows_axis = row;
      gather.columns_axis = column;
      gather.output.data += row.residue * gather.output.row_stride + column.residue * gather.output.column_stride;
      gather.output.height = row.outputs;
      gather.output.width = column.outputs;
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
