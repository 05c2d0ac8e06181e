// Batch normalisation with the statistics of the batch: sums per channel, what follows from them, and the elements.
#include "batch_norm.cuh"

namespace swat::cuda {
namespace {

// For each channel.
template <typename T>
struct Coefficients {
  static constexpr size_t kBytes = 5 * sizeof(Compute<T>) + sizeof(uint32_t);
  Compute<T>*center, *factor, *offset, *code_factor, *code_offset;
  uint32_t* keys;

  Coefficients(Compute<T>* memory, int64_t channels)
      : center(memory),
        factor(center + channels),
        offset(factor + channels),
        code_factor(offset + channels),
        code_offset(code_factor + channels),
        keys(reinterpret_cast<uint32_t*>(code_offset + channels)) {}
};

template <typename T, bool kWithExtremes>
struct InputSource {
  static constexpr bool kExtremes = kWithExtremes;
  const T* input;
  int64_t plane;  // elements between the first ones of two channels

  // Any element will do: what matters is to be near the mean, on the scale of the largest deviation.
  __device__ double channel(int64_t c) const { return load(input[c * plane]); }
  __device__ void add(double shift, int64_t at, Sums& sums) const {
    const double x = load(input[at]), v = x - shift;
    sums.sum += v;
    sums.product += v * v;
    if (kExtremes) {
      sums.least = x < sums.least ? x : sums.least;
      sums.greatest = x > sums.greatest ? x : sums.greatest;
    }
  }
};

// One warp a channel.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    find_coefficients(SumPlan plan, BatchNormParams<T> p, const Sums* partial, Coefficients<T> to) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
  if (c >= p.shape.channels) return;
  const Sums sums = total_of(partial, c, plan.parts);
  if (lane_id() != 0) return;
  const auto found = norm_channel<Compute<T>>(sums, load(p.input[c * p.shape.plane()]),
                                              static_cast<double>(p.shape.count()), p.eps, number_of<T>(p.weight, c, 1),
                                              number_of<T>(p.bias, c, 0), p.saved, p.seed == nullptr ? 0 : *p.seed, c);
  p.mean[c] = found.mean;
  p.invstd[c] = found.invstd;
  p.variance[c] = found.variance;
  if (p.saved == Saved::int8) p.scale[c] = found.scale;
  to.center[c] = found.center;
  to.factor[c] = found.factor;
  to.offset[c] = found.offset;
  to.code_factor[c] = found.code_factor;
  to.code_offset[c] = found.code_offset;
  to.keys[c] = found.key;
}

template <typename T, Saved kSaved>
__global__ void __launch_bounds__(kNormThreads) normalise(BatchNormParams<T> p, int64_t numel, Coefficients<T> by) {
  for_each_element(p.shape, numel, [&](int64_t index, int channel) {
    const Compute<T> v = load(p.input[index]) - by.center[channel];
    p.output[index] = store<T>(v * by.factor[channel] + by.offset[channel]);
    if constexpr (kSaved != Saved::exact) {
      const Compute<T> code = v * by.code_factor[channel] + by.code_offset[channel];
      if constexpr (kSaved == Saved::bf16) {
        static_cast<BFloat16*>(p.codes)[index] = store<BFloat16>(static_cast<float>(code));
      } else {
        static_cast<int8_t*>(p.codes)[index] =
            int8_code(code, random_fraction(static_cast<uint32_t>(index), by.keys[channel]));
      }
    }
  });
}

}  // namespace

template <typename T>
size_t batch_norm_scratch(const NormShape& shape) {
  return sums_bytes(sum_plan(shape)) + shape.channels * Coefficients<T>::kBytes;
}

template <typename T>
cudaError_t batch_norm(const BatchNormParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.shape.numel();
  if (numel == 0) return cudaSuccess;
  const SumPlan plan = sum_plan(p.shape);
  Sums* const partial = static_cast<Sums*>(p.scratch);
  const Coefficients<T> coefficients(coefficients_in<T>(p.scratch, plan), p.shape.channels);
  if (p.saved == Saved::int8) {
    launch_sums(plan, InputSource<T, true>{p.input, p.shape.plane()}, partial, stream);
  } else {
    launch_sums(plan, InputSource<T, false>{p.input, p.shape.plane()}, partial, stream);
  }
  SWAT_TRY(cudaGetLastError());
  SWAT_LAUNCH(find_coefficients<T>, ceil_div(p.shape.channels, kNormWarps), kNormThreads, 0, stream, plan, p, partial,
              coefficients);
  const int64_t blocks = element_blocks(numel);
  switch (p.saved) {
    case Saved::exact:
      SWAT_LAUNCH((normalise<T, Saved::exact>), blocks, kNormThreads, 0, stream, p, numel, coefficients);
      break;
    case Saved::bf16:
      SWAT_LAUNCH((normalise<T, Saved::bf16>), blocks, kNormThreads, 0, stream, p, numel, coefficients);
      break;
    case Saved::int8:
      SWAT_LAUNCH((normalise<T, Saved::int8>), blocks, kNormThreads, 0, stream, p, numel, coefficients);
      break;
  }
  return cudaGetLastError();
}

#define SWAT_INSTANTIATE(T)                                \
  template size_t batch_norm_scratch<T>(const NormShape&); \
  template cudaError_t batch_norm(const BatchNormParams<T>&, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
