// Max pooling, which keeps for each maximum its position in the window: row * kernel_width + column. As in torch, of equal values the
// first wins, and of NaN, which counts as largest, the last. One thread a result, neighbours in memory side by side.
//
// A contiguous tensor is one in channels_last with planes for images and one channel.
#include <cmath>
#include <limits>

#include "layers.h"

namespace swat::cuda {
namespace {

constexpr int kThreads = 256;

// MaxPoolShape in 32 bits.
struct Pool {
  int channels, height, width, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width, dilation_height, dilation_width;
};

// Where a thread's element lies.
struct Place {
  int64_t image;
  int row, column, channel;
};

__device__ inline Place place_of(int64_t index, int height, int width, int channels) {
  const uint32_t inner = static_cast<uint32_t>(height) * width * channels;
  const int64_t image = quotient(index, inner);
  uint32_t rest = static_cast<uint32_t>(index - image * inner);
  const int channel = static_cast<int>(rest % channels);
  rest /= channels;
  return {image, static_cast<int>(rest / width), static_cast<int>(rest % width), channel};
}

// Taps [begin, end) of a window along one axis that lie inside the input.
struct Taps {
  int begin, end;
};
__device__ inline Taps taps_inside(int start, int kernel, int dilation, int size) {
  const int begin = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int fit = start < size ? (size - start + dilation - 1) / dilation : 0;
  return {begin, fit < kernel ? fit : kernel};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    take_largest(Pool p, const T* input, int64_t numel, T* output, uint8_t* positions) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= numel) return;
  const Place to = place_of(index, p.out_height, p.out_width, p.channels);
  const int top = to.row * p.stride_height - p.pad_height, left = to.column * p.stride_width - p.pad_width;
  const Taps rows = taps_inside(top, p.kernel_height, p.dilation_height, p.height);
  const Taps columns = taps_inside(left, p.kernel_width, p.dilation_width, p.width);
  const T* const image = input + to.image * (static_cast<int64_t>(p.height) * p.width * p.channels) + to.channel;
  T kept = store<T>(-INFINITY);
  Compute<T> best = load(kept);
  int where = rows.begin * p.kernel_width + columns.begin;
  for (int kh = rows.begin; kh < rows.end; ++kh) {
    for (int kw = columns.begin; kw < columns.end; ++kw) {
      const int pixel = (top + kh * p.dilation_height) * p.width + left + kw * p.dilation_width;
      const T value = image[static_cast<int64_t>(pixel) * p.channels];
      const Compute<T> v = load(value);
      if (v > best || v != v) {
        kept = value;
        best = v;
        where = kh * p.kernel_width + kw;
      }
    }
  }
  output[index] = kept;
  positions[index] = static_cast<uint8_t>(where);
}

// Windows [begin, end) along one axis that may hold the line at `at`, counted from the edge of the padding.
struct Windows {
  int begin, end;
};
__device__ inline Windows windows_over(int at, int kernel, int stride, int dilation, int windows) {
  const int reach = at - (kernel - 1) * dilation;
  const int begin = reach > 0 ? (reach + stride - 1) / stride : 0, end = at / stride + 1;
  return {begin, end < windows ? end : windows};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_grad(Pool p, const T* grad_output, const uint8_t* positions, int64_t numel, T* grad_input) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= numel) return;
  const Place to = place_of(index, p.height, p.width, p.channels);
  const int row = to.row + p.pad_height, column = to.column + p.pad_width;
  const Windows down = windows_over(row, p.kernel_height, p.stride_height, p.dilation_height, p.out_height);
  const Windows along = windows_over(column, p.kernel_width, p.stride_width, p.dilation_width, p.out_width);
  const int64_t image = to.image * (static_cast<int64_t>(p.out_height) * p.out_width * p.channels) + to.channel;
  Compute<T> sum = 0;
  for (int i = down.begin; i < down.end; ++i) {
    const int kh = (row - i * p.stride_height) / p.dilation_height;
    if (kh * p.dilation_height != row - i * p.stride_height) continue;
    for (int j = along.begin; j < along.end; ++j) {
      const int kw = (column - j * p.stride_width) / p.dilation_width;
      if (kw * p.dilation_width != column - j * p.stride_width) continue;
      const int64_t from = image + static_cast<int64_t>(i * p.out_width + j) * p.channels;
      if (positions[from] == kh * p.kernel_width + kw) sum += load(grad_output[from]);
    }
  }
  grad_input[index] = store<T>(sum);
}

// Images, and the shape of one; whether all of it fits in 32 bits.
struct Plan {
  Pool pool;
  int64_t images;
  bool fits;
};

Plan plan_of(const MaxPoolShape& s) {
  const int64_t channels = s.channels_last ? s.channels : 1;
  // A window may reach past the image by its own extent.
  const int64_t reach =
      2 * (s.kernel_height * s.dilation_height + s.kernel_width * s.dilation_width + s.stride_height + s.stride_width);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool fits = s.height * s.width * channels <= kMost && s.out_height * s.out_width * channels <= kMost &&
                    s.height + reach <= kMost && s.width + reach <= kMost;
  auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const Pool pool{narrow(channels),        narrow(s.height),        narrow(s.width),        narrow(s.out_height),
                  narrow(s.out_width),     narrow(s.kernel_height), narrow(s.kernel_width), narrow(s.stride_height),
                  narrow(s.stride_width),  narrow(s.pad_height),    narrow(s.pad_width),    narrow(s.dilation_height),
                  narrow(s.dilation_width)};
  return {pool, s.channels_last ? s.batch : s.batch * s.channels, fits};
}

}  // namespace

template <typename T>
cudaError_t max_pool(const MaxPoolShape& shape, const T* input, T* output, uint8_t* positions, cudaStream_t stream) {
  const Plan plan = plan_of(shape);
  if (!plan.fits) return cudaErrorInvalidValue;
  const int64_t numel = plan.images * plan.pool.channels * shape.out_height * shape.out_width;
  if (numel == 0) return cudaSuccess;
  SWAT_LAUNCH(take_largest<T>, ceil_div(numel, kThreads), kThreads, 0, stream, plan.pool, input, numel, output,
              positions);
  return cudaGetLastError();
}

template <typename T>
cudaError_t max_pool_backward(const MaxPoolShape& shape, const T* grad_output, const uint8_t* positions, T* grad_input,
                              cudaStream_t stream) {
  const Plan plan = plan_of(shape);
  if (!plan.fits) return cudaErrorInvalidValue;
  const int64_t numel = plan.images * plan.pool.channels * shape.height * shape.width;
  if (numel == 0) return cudaSuccess;
  SWAT_LAUNCH(gather_grad<T>, ceil_div(numel, kThreads), kThreads, 0, stream, plan.pool, grad_output, positions, numel,
              grad_input);
  return cudaGetLastError();
}

#define SWAT_INSTANTIATE(T)                                                                 \
  template cudaError_t max_pool(const MaxPoolShape&, const T*, T*, uint8_t*, cudaStream_t); \
  template cudaError_t max_pool_backward(const MaxPoolShape&, const T*, const uint8_t*, T*, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
