// The gradient of a batch normalisation, from its input or from the codes of its normalised values.
#include "batch_norm.cuh"

namespace swat::cuda {
namespace {

// For each channel.
template <typename T>
struct Coefficients {
  static constexpr size_t kBytes = 4 * sizeof(Compute<T>);
  Compute<T>*center, *slope, *grade, *offset;

  Coefficients(Compute<T>* memory, int64_t channels)
      : center(memory), slope(center + channels), grade(slope + channels), offset(grade + channels) {}
};

// S is how the values are stored.
template <typename T, typename S>
struct GradSource {
  static constexpr bool kExtremes = false;
  BatchNormGradParams<T> params;

  __device__ double channel(int64_t c) const { return saved_shift(params.saved, params.mean[c]); }
  __device__ void add(double shift, int64_t at, Sums& sums) const {
    const double u = load(params.grad_output[at]);
    sums.sum += u;
    sums.product += u * (load(static_cast<const S*>(params.values)[at]) - shift);
  }
};

template <typename T>
__device__ inline void write_number(void* to, int64_t channel, bool narrow, double value) {
  const Compute<T> number = static_cast<Compute<T>>(value);
  if (narrow) {
    static_cast<T*>(to)[channel] = store<T>(number);
  } else {
    static_cast<Compute<T>*>(to)[channel] = number;
  }
}

// One warp a channel.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    find_coefficients(SumPlan plan, BatchNormGradParams<T> p, const Sums* partial, Coefficients<T> to) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
  if (c >= p.shape.channels) return;
  const Sums sums = total_of(partial, c, plan.parts);
  if (lane_id() != 0) return;
  const auto found =
      norm_grad_channel<Compute<T>>(sums, static_cast<double>(p.shape.count()), p.saved, p.mean[c], p.invstd[c],
                                    p.saved == Saved::int8 ? p.scale[c] : 1, number_of<T>(p.weight, c, 1));
  write_number<T>(p.grad_weight, c, p.narrow, found.grad_weight);
  write_number<T>(p.grad_bias, c, p.narrow, found.grad_bias);
  to.center[c] = found.center;
  to.slope[c] = found.slope;
  to.grade[c] = found.grade;
  to.offset[c] = found.offset;
}

template <typename T, typename S>
__global__ void __launch_bounds__(kNormThreads)
    find_input_grad(BatchNormGradParams<T> p, int64_t numel, Coefficients<T> by) {
  for_each_element(p.shape, numel, [&](int64_t index, int channel) {
    const Compute<T> grad = load(p.grad_output[index]), value = load(static_cast<const S*>(p.values)[index]);
    p.grad_input[index] =
        store<T>(grad * by.slope[channel] + ((value - by.center[channel]) * by.grade[channel] + by.offset[channel]));
  });
}

template <typename T, typename S>
cudaError_t run(const BatchNormGradParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.shape.numel();
  const SumPlan plan = sum_plan(p.shape);
  Sums* const partial = static_cast<Sums*>(p.scratch);
  const Coefficients<T> coefficients(coefficients_in<T>(p.scratch, plan), p.shape.channels);
  launch_sums(plan, GradSource<T, S>{p}, partial, stream);
  SWAT_TRY(cudaGetLastError());
  SWAT_LAUNCH(find_coefficients<T>, ceil_div(p.shape.channels, kNormWarps), kNormThreads, 0, stream, plan, p, partial,
              coefficients);
  SWAT_TRY(cudaGetLastError());
  SWAT_LAUNCH((find_input_grad<T, S>), element_blocks(numel), kNormThreads, 0, stream, p, numel, coefficients);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
size_t batch_norm_backward_scratch(const NormShape& shape) {
  return sums_bytes(sum_plan(shape)) + shape.channels * Coefficients<T>::kBytes;
}

template <typename T>
cudaError_t batch_norm_backward(const BatchNormGradParams<T>& p, cudaStream_t stream) {
  if (p.shape.numel() == 0) {
    // Sums of nothing.
    const size_t bytes = p.shape.channels * (p.narrow ? sizeof(T) : sizeof(Compute<T>));
    if (bytes == 0) return cudaSuccess;
    SWAT_TRY(cudaMemsetAsync(p.grad_weight, 0, bytes, stream));
    return cudaMemsetAsync(p.grad_bias, 0, bytes, stream);
  }
  switch (p.saved) {
    case Saved::exact:
      return run<T, T>(p, stream);
    case Saved::bf16:
      return run<T, BFloat16>(p, stream);
    default:
      return run<T, int8_t>(p, stream);
  }
}

#define SWAT_INSTANTIATE(T)                                         \
  template size_t batch_norm_backward_scratch<T>(const NormShape&); \
  template cudaError_t batch_norm_backward(const BatchNormGradParams<T>&, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
