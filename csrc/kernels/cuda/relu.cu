// ReLU, and the bits that its backward pass needs: lanes of a warp hold neighbours, so that a ballot is half a word of the mask.
#include "bits.h"
#include "layers.h"
#include "warp.cuh"

namespace swat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Halves of words that a warp takes: reads of 1 KiB are on their way together, whatever T is.
template <typename T>
constexpr int kHalves = 32 / sizeof(T);

template <typename T>
__global__ void __launch_bounds__(kThreads) clip(const T* input, int64_t numel, T* output, uint32_t* halves) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kHalves<T>;
  T values[kHalves<T>];
#pragma unroll
  for (int i = 0; i < kHalves<T>; ++i) {
    const int64_t index = (first + i) * kWarp + lane_id();
    values[i] = index < numel ? input[index] : from_bits<T>(0);
  }
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kHalves<T>; ++i) {
    const int64_t index = (first + i) * kWarp + lane_id();
    const Compute<T> v = load(values[i]);
    const uint32_t passing = __ballot_sync(kAllLanes, !(v <= 0));
    if (lane_id() == i) mine = passing;
    if (index < numel) output[index] = v < 0 ? from_bits<T>(0) : values[i];
  }
  // The mask ends with a whole word: past the last element its bits are zero.
  if (lane_id() < kHalves<T> && first + lane_id() < 2 * word_count(numel)) halves[first + lane_id()] = mine;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    clip_grad(const T* grad_output, const uint32_t* halves, int64_t numel, T* grad_input) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kHalves<T>;
  const bool holds = lane_id() < kHalves<T> && first + lane_id() < 2 * word_count(numel);
  const uint32_t mine = holds ? halves[first + lane_id()] : 0;
  T values[kHalves<T>];
#pragma unroll
  for (int i = 0; i < kHalves<T>; ++i) {
    const int64_t index = (first + i) * kWarp + lane_id();
    values[i] = index < numel ? grad_output[index] : from_bits<T>(0);
  }
#pragma unroll
  for (int i = 0; i < kHalves<T>; ++i) {
    const int64_t index = (first + i) * kWarp + lane_id();
    const bool passes = __shfl_sync(kAllLanes, mine, i) >> lane_id() & 1;
    if (index < numel) grad_input[index] = passes ? values[i] : from_bits<T>(0);
  }
}

template <typename T>
int64_t blocks_for(int64_t numel) {
  return ceil_div(numel, kThreads * kHalves<T>);
}

}  // namespace

template <typename T>
cudaError_t relu(const T* input, int64_t numel, T* output, uint64_t* words, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  SWAT_LAUNCH(clip<T>, blocks_for<T>(numel), kThreads, 0, stream, input, numel, output,
              reinterpret_cast<uint32_t*>(words));
  return cudaGetLastError();
}

template <typename T>
cudaError_t relu_backward(const T* grad_output, const uint64_t* words, int64_t numel, T* grad_input,
                          cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  SWAT_LAUNCH(clip_grad<T>, blocks_for<T>(numel), kThreads, 0, stream, grad_output,
              reinterpret_cast<const uint32_t*>(words), numel, grad_input);
  return cudaGetLastError();
}

#define SWAT_INSTANTIATE(T)                                                  \
  template cudaError_t relu(const T*, int64_t, T*, uint64_t*, cudaStream_t); \
  template cudaError_t relu_backward(const T*, const uint64_t*, int64_t, T*, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
