// The k-th largest magnitude by radix selection: each pass counts the next 11 bits of those elements that agree with the bits
// found so far, and a single block then finds the digit in which the k-th lies. Integers alone are summed by atomics.
#include "launchers.h"
#include "warp.cuh"

namespace swat::cuda {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kThreads = 512;
constexpr int kCopies = 4;  // of the histogram, so that warps meet less in a bin: values of a layer share few exponents
constexpr int kUnroll = 4;
constexpr int64_t kMostBlocks = 1024;
constexpr int kFindThreads = 256;
constexpr int kFindDigits = kDigits / kFindThreads;

struct State {
  uint64_t prefix;    // the digits found so far
  int64_t remaining;  // k among the elements that have them
};

struct Scratch {
  State state;
  uint32_t counts[kDigits];
};

// Digit 0 is not counted: it is what remains if no other holds the k-th, and in the output of a ReLU it is most elements.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_digits(const T* data, int64_t count, int shift, Scratch* scratch, const int32_t* condition) {
  SWAT_SHARED(bins, uint32_t[kCopies][kDigits]);
  if (skipped(condition)) return;
  for (int i = threadIdx.x; i < kCopies * kDigits; i += kThreads) bins[i / kDigits][i % kDigits] = 0;
  __syncthreads();
  const uint64_t prefix = scratch->state.prefix;
  uint32_t* const mine = bins[threadIdx.x / kWarp % kCopies];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < count;
       first += kUnroll * stride) {
    uint64_t keys[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = first + i * stride;
      keys[i] = at < count ? magnitude_bits(data[at]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int digit = static_cast<int>(keys[i] >> shift) & (kDigits - 1);
      if (digit != 0 && keys[i] >> shift >> kDigitBits == prefix) atomicAdd(&mine[digit], 1u);
    }
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) {
    uint32_t sum = 0;
    for (int copy = 0; copy < kCopies; ++copy) sum += bins[copy][digit];
    if (sum != 0) atomicAdd(&scratch->counts[digit], sum);
  }
}

// One block: find the digit, from the highest down, clear the counts, and after the last digit write the result.
template <typename T>
__global__ void __launch_bounds__(kFindThreads)
    find_digit(int64_t k, bool first, bool last, Scratch* scratch, T* result, const int32_t* condition) {
  SWAT_SHARED(shared, int64_t[kWarp + 1]);
  if (skipped(condition)) return;
  const uint64_t prefix = scratch->state.prefix;
  const int64_t wanted = first ? k : scratch->state.remaining;
  const int top = kDigits - 1 - static_cast<int>(threadIdx.x) * kFindDigits;  // this thread's highest digit
  int64_t sum = 0;
  uint32_t counts[kFindDigits];
#pragma unroll
  for (int i = 0; i < kFindDigits; ++i) {
    counts[i] = scratch->counts[top - i];
    sum += counts[i];
  }
  int64_t total;
  const int64_t before = block_exclusive(sum, shared, &total);  // its barriers also end the reading of the state
  int digit = -1;
  int64_t remaining = 0;
  if (total < wanted) {
    if (threadIdx.x == 0) digit = 0, remaining = wanted - total;
  } else if (before < wanted && wanted <= before + sum) {
    int64_t passed = before;
#pragma unroll
    for (int i = 0; i < kFindDigits; ++i) {
      if (digit < 0 && wanted <= passed + counts[i]) digit = top - i, remaining = wanted - passed;
      passed += counts[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kFindDigits; ++i) scratch->counts[top - i] = 0;
  if (digit >= 0) {  // exactly one thread
    const uint64_t found = prefix << kDigitBits | static_cast<uint64_t>(digit);
    scratch->state.prefix = found;
    scratch->state.remaining = remaining;
    if (last) *result = from_bits<T>(found);
  }
}

}  // namespace

size_t kth_magnitude_scratch() { return sizeof(Scratch); }

template <typename T>
cudaError_t kth_magnitude(const MagnitudeParams<T>& p, cudaStream_t stream) {
  if (p.count < 1 || p.k < 1 || p.k > p.count || p.count >> 32 != 0) return cudaErrorInvalidValue;
  Scratch* const scratch = static_cast<Scratch*>(p.scratch);
  SWAT_TRY(cudaMemsetAsync(scratch, 0, sizeof(Scratch), stream));
  const int64_t blocks = ceil_div(p.count, kThreads * kUnroll);
  constexpr int kKeyBits = sizeof(T) * 8 - 1;
  constexpr int kTop = static_cast<int>(ceil_div(kKeyBits, kDigitBits) - 1) * kDigitBits;
  for (int shift = kTop; shift >= 0; shift -= kDigitBits) {
    SWAT_LAUNCH(count_digits<T>, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, 0, stream, p.data, p.count,
                shift, scratch, p.condition);
    SWAT_LAUNCH(find_digit<T>, 1, kFindThreads, 0, stream, p.k, shift == kTop, shift == 0, scratch, p.result,
                p.condition);
  }
  return cudaGetLastError();
}

template cudaError_t kth_magnitude(const MagnitudeParams<float>&, cudaStream_t);
template cudaError_t kth_magnitude(const MagnitudeParams<double>&, cudaStream_t);
template cudaError_t kth_magnitude(const MagnitudeParams<BFloat16>&, cudaStream_t);
template cudaError_t kth_magnitude(const MagnitudeParams<Half>&, cudaStream_t);

}  // namespace swat::cuda
