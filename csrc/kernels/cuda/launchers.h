// Launchers of the CUDA kernels. Each enqueues on `stream`, waits for nothing, allocates nothing, and returns the first error of
// its launches. Results repeat bit for bit: no kernel sums floating point numbers in an order that timing decides.
#pragma once

#include "params.h"

namespace swat::cuda {

// *result = the k-th largest |data[i]|, exactly; NaN counts as largest. Radix selection: 11 bits a pass, from the top.
size_t kth_magnitude_scratch();
template <typename T>
cudaError_t kth_magnitude(const MagnitudeParams<T>& params, cudaStream_t stream);

// The packed form of `input`: the bitmap, the rank directory, the number of kept elements, and the first `capacity` of them in
// logical order. What lies in `values` past the last kept one is left as it is.
template <typename T>
size_t compress_scratch(const CompressParams<T>& params);
template <typename T>
cudaError_t compress(const CompressParams<T>& params, cudaStream_t stream);

// *condition = whether *kept is more than `most`, or fewer than `least` under a threshold above 0.
template <typename T>
cudaError_t outside(const int64_t* kept, int64_t least, int64_t most, const T* threshold, int32_t* condition,
                    cudaStream_t stream);

// Where more than `capacity` elements are kept, drop the last ones in logical order: clear their bits, correct ranks and *kept.
cudaError_t trim(uint64_t* words, int64_t* ranks, int64_t* kept, int64_t numel, int64_t capacity, cudaStream_t stream);

// values[*kept..capacity) = 0.
template <typename T>
cudaError_t clear_tail(T* values, const int64_t* kept, int64_t capacity, cudaStream_t stream);

// The dense tensor, or a run of its samples, written whole.
template <typename T>
cudaError_t decompress(const DecompressParams<T>& params, cudaStream_t stream);

// output[N, O, H', W'] = conv(input, weight) + bias, skipping dropped weights; sums in float (double for double).
template <typename T>
size_t convolution_scratch(const ConvolutionParams<T>& params);
template <typename T>
cudaError_t convolution(const ConvolutionParams<T>& params, cudaStream_t stream);

// grad_input[N, C, H, W] from grad_output and the kept weights.
template <typename T>
size_t convolution_input_grad_scratch(const InputGradParams<T>& params);
template <typename T>
cudaError_t convolution_input_grad(const InputGradParams<T>& params, cudaStream_t stream);

}  // namespace swat::cuda
