// The weight gradient: dW[o, (c, tap)] = sum over pixels of dy[o, pixel] * top(x)[c, pixel at tap].
//
// A block holds 64 x 64 of dW in registers. For each tile of pixels it expands the packed input, with its halo, in shared memory:
// the only place where the dense activation exists. Column (c, tap) of pixel p then lies at offset(c, tap) + offset(p), whatever
// stride, dilation and padding are. The tiles are shared over slices of blocks, whose sums are added in a fixed order.
#include "launchers.h"
#include "mma.cuh"
#include "weight_grad.cuh"

namespace swat::cuda {
namespace {

// ---- Multiplying on ordinary cores ------------------------------------------------------------------------------------------

constexpr int kThreadRows = 8, kThreadColumns = 4;
constexpr int kRowGroups = kGradRows / kThreadRows;           // 8 groups of threads along rows,
constexpr int kColumnGroups = kGradColumns / kThreadColumns;  // 16 along columns
static_assert(kRowGroups * kColumnGroups == kGradThreads);

template <typename C>
constexpr int kPlainPixels = sizeof(C) == 4 ? 64 : 32;  // of a tile

template <typename T>
__global__ void __launch_bounds__(kGradThreads) grad_plain(GradParams<T, Compute<T>> p) {
  using C = Compute<T>;
  constexpr int kPixels = kPlainPixels<C>;
  constexpr int kStride = kGradRows + 4;  // keeps 16-byte alignment
  __shared__ GradPixel pixels[kPixels];
  __shared__ __align__(16) C grad[kPixels * kStride];  // [pixel, row]
  SWAT_DYNAMIC_SHARED(shared);
  C* const patch = reinterpret_cast<C*>(shared);
  const GradBlock block = grad_block(p.geometry, p.plan);
  const int row = threadIdx.x % kRowGroups * kThreadRows, column = threadIdx.x / kRowGroups;
  int offsets[kThreadColumns];
  C sums[kThreadRows][kThreadColumns];
#pragma unroll
  for (int j = 0; j < kThreadColumns; ++j) {
    offsets[j] = column_offset(p.geometry, p.plan, block, column + j * kColumnGroups);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) sums[i][j] = 0;
  }
  for (int tile = block.tile_begin; tile < block.tile_end; ++tile) {
    __syncthreads();
    stage_input<T, C, kPixels>(p, block, tile, pixels, patch, [](T value) { return load(value); });
    __syncthreads();
    stage_grad<T, C, kPixels>(p, block, pixels,
                              [&](int r, int pixel, T value) { grad[pixel * kStride + r] = load(value); });
    __syncthreads();
#pragma unroll 2
    for (int k = 0; k < kPixels; ++k) {
      const int at = pixels[k].patch;
      if (at < 0) continue;  // the same for all threads
      C left[kThreadRows], right[kThreadColumns];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) left[i] = grad[k * kStride + row + i];
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) right[j] = patch[at + offsets[j]];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) sums[i][j] += left[i] * right[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) put_sum(p, block, row + i, column + j * kColumnGroups, sums[i][j]);
  }
}

// ---- Multiplying on tensor cores --------------------------------------------------------------------------------------------

constexpr int kWarpRows = 32, kWarpColumns = 32;  // 2 x 2 warps
constexpr int kTilesM = kWarpRows / 16, kTilesN = kWarpColumns / 8;

// What is in shared memory: 16-bit numbers as they are, float rounded to tf32.
template <typename T>
__device__ inline T for_tensor_cores(T value) {
  if constexpr (sizeof(T) == 4) {
    return round_to_tf32(value);
  } else {
    return value;
  }
}

template <typename T>
constexpr int kTensorPixels = sizeof(T) == 4 ? 64 : 128;

template <typename T>
__global__ void __launch_bounds__(kGradThreads) grad_tensor(GradParams<T, T> p) {
  constexpr int kPixels = kTensorPixels<T>;
  constexpr int kPack = 4 / sizeof(T);          // numbers of one register
  constexpr int kDepth = 8 * kPack;             // pixels of one mma
  constexpr int kStride = kPixels + 4 * kPack;  // a lane's row starts 4 banks after the one before
  __shared__ GradPixel pixels[kPixels];
  __shared__ __align__(16) T grad[kGradRows * kStride];  // [row, pixel]
  SWAT_DYNAMIC_SHARED(shared);
  T* const patch = reinterpret_cast<T*>(shared);
  const GradBlock block = grad_block(p.geometry, p.plan);
  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int first_row = warp % 2 * kWarpRows, first_column = warp / 2 * kWarpColumns;
  int offsets[kTilesN];
  float sums[kTilesM][kTilesN][4];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    offsets[n] = column_offset(p.geometry, p.plan, block, first_column + n * 8 + g);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
    }
  }
  for (int tile = block.tile_begin; tile < block.tile_end; ++tile) {
    __syncthreads();
    stage_input<T, T, kPixels>(p, block, tile, pixels, patch, [](T value) { return for_tensor_cores(value); });
    __syncthreads();
    stage_grad<T, T, kPixels>(p, block, pixels,
                              [&](int r, int pixel, T value) { grad[r * kStride + pixel] = for_tensor_cores(value); });
    __syncthreads();
    for (int k = 0; k < kPixels; k += kDepth) {
      uint32_t left[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first_row + m * 16 + g + 8 * (i % 2), pixel = k + t * kPack + 4 * kPack * (i / 2);
          left[m][i] = *reinterpret_cast<const uint32_t*>(&grad[row * kStride + pixel]);
        }
      }
      int at[2][kPack];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) at[i][j] = pixels[k + (t + 4 * i) * kPack + j].patch;
      }
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        uint32_t right[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          right[i] = 0;
#pragma unroll
          for (int j = 0; j < kPack; ++j) {
            // A pixel that is not there is 0 and not what lies in its place, which times a dy of 0 may be NaN.
            if (at[i][j] >= 0) {
              right[i] |= static_cast<uint32_t>(bit_copy<typename Traits<T>::Bits>(patch[at[i][j] + offsets[n]]))
                          << (16 * j);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) mma<T>(sums[m][n], left[m], right);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        put_sum(p, block, first_row + m * 16 + g + 8 * (i / 2), first_column + n * 8 + 2 * t + i % 2, sums[m][n][i]);
      }
    }
  }
}

// ---- The rest ---------------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_slices(const Compute<T>* partial, int64_t slices, int64_t count, GradLayout layout, T* result) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  Compute<T> sum = 0;
  for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * count + at];
  const int columns = layout.group_in * layout.taps;
  result[layout.place(at / columns, static_cast<int>(at % columns))] = store<T>(sum);
}

// For kernels so wide that the input of not one pixel fits in shared memory: a thread computes one gradient.
template <typename T>
__global__ void __launch_bounds__(kThreads) grad_direct(WeightGradParams<T> p, GradLayout layout, int count) {
  const ConvGeometry& g = p.geometry;
  const int at = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int taps = static_cast<int>(g.taps()), group_in = static_cast<int>(g.in_channels) / static_cast<int>(g.groups);
  const int tap = at % taps, row = at / taps / group_in,
            group = row / (static_cast<int>(g.out_channels) / static_cast<int>(g.groups));
  const int64_t channel = group * group_in + at / taps % group_in;
  const int tap_y = tap / static_cast<int>(g.kernel_width), tap_x = tap % static_cast<int>(g.kernel_width);
  Compute<T> sum = 0;
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t y = 0; y < g.out_height; ++y) {
      const int64_t from_y = y * g.stride_height + tap_y * g.dilation_height - g.pad_top;
      if (from_y < 0 || from_y >= g.in_height) continue;
      for (int64_t x = 0; x < g.out_width; ++x) {
        const int64_t from_x = x * g.stride_width + tap_x * g.dilation_width - g.pad_left;
        if (from_x < 0 || from_x >= g.in_width) continue;
        const int64_t index = ((n * g.in_channels + channel) * g.in_height + from_y) * g.in_width + from_x;
        if (!bit_at(p.input.words, index)) continue;
        const ImageView<const T>& dy = p.grad_output;
        sum += load(p.input.values[rank_before(p.input.words, p.input.ranks, index)]) *
               load(dy.data[n * dy.batch_stride + row * dy.channel_stride + y * dy.row_stride + x * dy.column_stride]);
      }
    }
  }
  p.grad_weight[layout.place(row, at % (group_in * taps))] = store<T>(sum);
}

// A 1x1 convolution without stride or padding sees no neighbours: one long row makes longer runs. The packed input always joins.
template <typename T>
void join_rows(ConvGeometry& g, ImageView<const T>& grad) {
  const bool pointwise = g.taps() == 1 && g.stride_height == 1 && g.stride_width == 1 && g.pad_top == 0 &&
                         g.pad_left == 0 && g.out_height == g.in_height && g.out_width == g.in_width;
  if (!pointwise || grad.row_stride != grad.width * grad.column_stride) return;
  g.in_width = g.out_width = g.in_width * g.in_height;
  g.in_height = g.out_height = 1;
  grad.width = g.out_width;
  grad.height = 1;
  grad.row_stride = grad.width * grad.column_stride;
}

template <typename T>
bool uses_tensor_cores(const WeightGradParams<T>& p) {
  return sizeof(T) == 2 || (sizeof(T) == 4 && p.allow_tf32);
}

template <typename T>
WeightGradPlan plan_for(const WeightGradParams<T>& p, const ConvGeometry& g) {
  return uses_tensor_cores(p) ? plan_weight_grad(g, kTensorPixels<T>, sizeof(T))
                              : plan_weight_grad(g, kPlainPixels<Compute<T>>, sizeof(Compute<T>));
}

}  // namespace

template <typename T>
size_t convolution_weight_grad_scratch(const WeightGradParams<T>& p) {
  ConvGeometry g = p.geometry;
  ImageView<const T> grad = p.grad_output;
  if (grad.numel() == 0) return 0;
  join_rows(g, grad);
  const WeightGradPlan plan = plan_for(p, g);
  return plan.slices == 1 ? 0 : plan.slices * g.out_channels * g.group_in() * g.taps() * sizeof(Compute<T>);
}

template <typename T>
cudaError_t convolution_weight_grad(const WeightGradParams<T>& p, cudaStream_t stream) {
  ConvGeometry g = p.geometry;
  ImageView<const T> grad = p.grad_output;
  const int64_t count = g.out_channels * g.group_in() * g.taps();
  if (count > INT32_MAX) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  if (grad.numel() == 0) return cudaMemsetAsync(p.grad_weight, 0, count * sizeof(T), stream);
  join_rows(g, grad);
  const WeightGradPlan plan = plan_for(p, g);
  const GradLayout layout = grad_layout(g, p.channels_last);
  if (plan.direct) {
    SWAT_LAUNCH(grad_direct<T>, ceil_div(count, kThreads), kThreads, 0, stream, p, layout, static_cast<int>(count));
    return cudaGetLastError();
  }
  const dim3 grid(g.groups * plan.row_blocks * plan.column_blocks, plan.slices);
  Compute<T>* const partial = static_cast<Compute<T>*>(p.scratch);
  const size_t patch = grad_channels(g) * plan.patch;
  bool launched = false;
  if constexpr (sizeof(T) <= 4) {
    if (uses_tensor_cores(p)) {
      const GradParams<T, T> params{g, plan, grad, p.input, p.grad_weight, layout, partial};
      SWAT_LAUNCH(grad_tensor<T>, grid, kGradThreads, patch * sizeof(T), stream, params);
      launched = true;
    }
  }
  if constexpr (sizeof(T) >= 4) {
    if (!launched) {
      const GradParams<T, Compute<T>> params{g, plan, grad, p.input, p.grad_weight, layout, partial};
      SWAT_LAUNCH(grad_plain<T>, grid, kGradThreads, patch * sizeof(Compute<T>), stream, params);
    }
  }
  SWAT_TRY(cudaGetLastError());
  if (plan.slices > 1) {
    SWAT_LAUNCH(add_slices<T>, ceil_div(count, kThreads), kThreads, 0, stream, partial, plan.slices, count, layout,
                p.grad_weight);
  }
  return cudaGetLastError();
}

#define SWAT_INSTANTIATE(T)                                                    \
  template size_t convolution_weight_grad_scratch(const WeightGradParams<T>&); \
  template cudaError_t convolution_weight_grad(const WeightGradParams<T>&, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
