// The gradient of a batch normalisation, from its input or from the codes of its normalised values h:
// grad_input = weight * invstd * (grad - mean(grad) - h * mean(grad * h)), of which what is saved gives h = (saved - shift) * unit.
#include <type_traits>

#include "batch_norm.cuh"

namespace swat::cuda {
namespace {

// grad_input = grad * slope + (saved - center) * grade + offset for each channel.
template <typename T>
struct Coefficients {
  Compute<T> center, slope, grade, offset;
};

// S is how the values are stored.
template <typename T, typename S>
struct GradSource {
  static constexpr bool kExtremes = false;
  BatchNormGradParams<T> params;

  __device__ double channel(int64_t c) const { return params.saved == Saved::exact ? params.mean[c] : 0; }
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
    find_coefficients(SumPlan plan, BatchNormGradParams<T> p, const Sums* partial, Coefficients<T>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
  if (c >= p.shape.channels) return;
  const Sums sums = total_of(partial, c, plan.parts);
  if (lane_id() != 0) return;
  const double count = static_cast<double>(p.shape.batch * p.shape.pixels);
  const bool exact = p.saved == Saved::exact;
  const double shift = exact ? p.mean[c] : 0;
  const double unit = exact ? p.invstd[c] : p.saved == Saved::int8 ? p.scale[c] : 1;
  const double weighted = sums.product * unit;  // sum of grad * h
  const double scaled = number_of<T>(p.weight, c, 1) * p.invstd[c];
  const double tilt = -scaled * weighted / count * unit;
  write_number<T>(p.grad_weight, c, p.narrow, weighted);
  write_number<T>(p.grad_bias, c, p.narrow, sums.sum);
  Coefficients<T> to{};
  to.center = static_cast<Compute<T>>(shift);
  to.slope = static_cast<Compute<T>>(scaled);
  to.grade = static_cast<Compute<T>>(tilt);
  to.offset = static_cast<Compute<T>>(-scaled * sums.sum / count - (shift - to.center) * tilt);
  coefficients[c] = to;
}

template <typename T, typename S>
__global__ void __launch_bounds__(kNormThreads)
    find_input_grad(BatchNormGradParams<T> p, int64_t numel, const Coefficients<T>* coefficients) {
  for_each_element(p.shape, numel, [&](int64_t index, int channel) {
    const Coefficients<T>& by = coefficients[channel];
    const Compute<T> grad = load(p.grad_output[index]), value = load(static_cast<const S*>(p.values)[index]);
    p.grad_input[index] = store<T>(grad * by.slope + ((value - by.center) * by.grade + by.offset));
  });
}

template <typename T, typename S>
cudaError_t run(const BatchNormGradParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.shape.numel();
  const SumPlan plan = sum_plan(p.shape);
  Sums* const partial = static_cast<Sums*>(p.scratch);
  auto* const coefficients =
      reinterpret_cast<Coefficients<T>*>(static_cast<unsigned char*>(p.scratch) + sums_bytes(plan));
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
size_t batch_norm_backward_scratch(const BatchNormGradParams<T>& p) {
  return sums_bytes(sum_plan(p.shape)) + p.shape.channels * sizeof(Coefficients<T>);
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

#define SWAT_INSTANTIATE(T)                                                   \
  template size_t batch_norm_backward_scratch(const BatchNormGradParams<T>&); \
  template cudaError_t batch_norm_backward(const BatchNormGradParams<T>&, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
