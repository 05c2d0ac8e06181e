#include "bias_grad.h"

#include <algorithm>

#include "buffer.h"

namespace swat::cpu {
namespace {

constexpr int64_t kPart = 64;                // pixels: float32 stays accurate over so few
constexpr int64_t kGrainElements = 1 << 15;  // below this a thread costs more than it saves

}  // namespace

template <typename T>
void bias_grad(const KernelTable& table, const Parallel& parallel, const ImageView<const T>& grad_output, T* result) {
  const Kernels<T>& kernels = table.of<T>();
  const int64_t channels = grad_output.channels, pixels = grad_output.batch * grad_output.height * grad_output.width;
  const int64_t parts = ceil_div(pixels, kPart);
  Buffer<T> sums(parts * channels);
  parallel(parts, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, kPart * channels)),
           [&](int64_t begin, int64_t end) { kernels.sum_parts(grad_output, kPart, begin, end, sums.data()); });
  parallel(channels, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, parts)),
           [&](int64_t begin, int64_t end) { kernels.add_parts(sums.data(), parts, channels, begin, end, result); });
}

template void bias_grad(const KernelTable&, const Parallel&, const ImageView<const float>&, float*);
template void bias_grad(const KernelTable&, const Parallel&, const ImageView<const double>&, double*);

}  // namespace swat::cpu
