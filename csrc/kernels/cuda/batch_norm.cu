// Batch normalisation with the statistics of the batch: sums per channel, what follows from them, and the elements.
#include "batch_norm.cuh"

namespace swat::cuda {
namespace {

// For each channel; code = (input - center) * code_factor + code_offset.
template <typename T>
struct Coefficients {
  Affine<T> output;
  Compute<T> code_factor, code_offset;
  uint32_t key;  // of the random numbers
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

__device__ inline uint64_t mixed(uint64_t x) {
  x ^= x >> 32;
  x *= 0x9E3779B97F4A7C15u;
  x ^= x >> 29;
  x *= 0xD1B54A32D192ED03u;
  return x ^ (x >> 32);
}

// The statistics are part of the key, so that layers of equal seeds round differently.
__device__ inline uint32_t key_of(int64_t seed, int64_t channel, double mean, double invstd) {
  uint64_t key = mixed(static_cast<uint64_t>(seed));
  key = mixed(key ^ static_cast<uint64_t>(channel));
  key = mixed(key ^ bit_copy<uint64_t>(mean));
  return static_cast<uint32_t>(mixed(key ^ bit_copy<uint64_t>(invstd)) >> 32);
}

// A number in [0, 1) that depends on the element and the key of its channel alone.
__device__ inline float random_fraction(uint32_t index, uint32_t key) {
  uint32_t h = (index * 0x9E3779B1u) ^ key;
  h = (h ^ (h >> 16)) * 0xA3D95FA5u;
  h = (h ^ (h >> 15)) * 0xD6E8FEB7u;
  h ^= h >> 16;
  return static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f;
}

// Whether dividing by it is safe.
__device__ inline bool is_normal(float value) { return value >= 0x1p-126f && value < INFINITY; }
__device__ inline bool is_normal(double value) { return value >= 0x1p-1022 && value < INFINITY; }

// One warp a channel.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    find_coefficients(SumPlan plan, BatchNormParams<T> p, const Sums* partial, Coefficients<T>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
  if (c >= p.shape.channels) return;
  const Sums sums = total_of(partial, c, plan.parts);
  if (lane_id() != 0) return;
  const double count = static_cast<double>(p.shape.batch * p.shape.pixels);
  const double about = sums.sum / count;
  const double mean = load(p.input[c * (p.shape.channels_last ? 1 : p.shape.pixels)]) + about;
  const double squares = sums.product - sums.sum * about;
  // Rounding may leave a sum of squares a little below zero; NaN stays.
  const double spread = squares < 0 ? 0 : squares;
  const double invstd = 1 / std::sqrt(spread / count + p.eps);
  p.mean[c] = mean;
  p.invstd[c] = invstd;
  p.variance[c] = spread / (count - 1);
  Coefficients<T> to{};
  to.output = affine_of<T>(mean, invstd, p.weight, p.bias, c);
  Compute<T> unit = 1;
  if (p.saved == Saved::int8) {
    const double above = sums.greatest - mean, below = mean - sums.least;
    const double largest = (above > below ? above : below) * invstd;
    unit = static_cast<Compute<T>>(mean != mean ? mean : largest / 127);
    p.scale[c] = unit;
    to.key = key_of(p.seed == nullptr ? 0 : *p.seed, c, mean, invstd);
  }
  const double per_unit = is_normal(unit) ? invstd / unit : 0;
  to.code_factor = static_cast<Compute<T>>(per_unit);
  to.code_offset = static_cast<Compute<T>>((to.output.center - mean) * per_unit);
  coefficients[c] = to;
}

template <typename T, Saved kSaved>
__global__ void __launch_bounds__(kNormThreads)
    normalise(BatchNormParams<T> p, int64_t numel, const Coefficients<T>* coefficients) {
  for_each_element(p.shape, numel, [&](int64_t index, int channel) {
    const Coefficients<T>& by = coefficients[channel];
    const Compute<T> v = load(p.input[index]) - by.output.center;
    p.output[index] = store<T>(v * by.output.factor + by.output.offset);
    if constexpr (kSaved == Saved::bf16) {
      static_cast<BFloat16*>(p.codes)[index] = store<BFloat16>(static_cast<float>(v * by.code_factor + by.code_offset));
    } else if constexpr (kSaved == Saved::int8) {
      const Compute<T> code =
          std::floor(v * by.code_factor + by.code_offset + random_fraction(static_cast<uint32_t>(index), by.key));
      // So written that NaN becomes a number.
      static_cast<int8_t*>(p.codes)[index] = static_cast<int8_t>(!(code > -127) ? -127 : code < 127 ? code : 127);
    }
  });
}

}  // namespace

template <typename T>
size_t batch_norm_scratch(const BatchNormParams<T>& p) {
  return sums_bytes(sum_plan(p.shape)) + p.shape.channels * sizeof(Coefficients<T>);
}

template <typename T>
cudaError_t batch_norm(const BatchNormParams<T>& p, cudaStream_t stream) {
  const int64_t numel = p.shape.numel();
  if (numel == 0) return cudaSuccess;
  const SumPlan plan = sum_plan(p.shape);
  Sums* const partial = static_cast<Sums*>(p.scratch);
  auto* const coefficients =
      reinterpret_cast<Coefficients<T>*>(static_cast<unsigned char*>(p.scratch) + sums_bytes(plan));
  const int64_t plane = p.shape.channels_last ? 1 : p.shape.pixels;
  if (p.saved == Saved::int8) {
    launch_sums(plan, InputSource<T, true>{p.input, plane}, partial, stream);
  } else {
    launch_sums(plan, InputSource<T, false>{p.input, plane}, partial, stream);
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

#define SWAT_INSTANTIATE(T)                                      \
  template size_t batch_norm_scratch(const BatchNormParams<T>&); \
  template cudaError_t batch_norm(const BatchNormParams<T>&, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
