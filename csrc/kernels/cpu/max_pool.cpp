#include "max_pool.h"

#include <algorithm>

namespace swat::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // below this a thread costs more than it saves

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements)); }

}  // namespace

template <typename T>
void max_pool(const KernelTable& table, const Parallel& parallel, const MaxPoolShape& shape, const T* input, T* output,
              uint8_t* positions) {
  const int64_t images = shape.channels_last ? shape.batch : shape.batch * shape.channels;
  const int64_t row = shape.out_width * (shape.channels_last ? shape.channels : 1);
  parallel(images * shape.out_height, grain(row), [&](int64_t begin, int64_t end) {
    table.of<T>().max_pool_rows(shape, input, begin, end, output, positions);
  });
}

template <typename T>
void max_pool_backward(const KernelTable& table, const Parallel& parallel, const MaxPoolShape& shape,
                       const T* grad_output, const uint8_t* positions, T* grad_input) {
  const bool last = shape.channels_last;
  const int64_t count = shape.batch * (last ? shape.height : shape.channels);
  parallel(count, grain(shape.width * (last ? shape.channels : shape.height)), [&](int64_t begin, int64_t end) {
    table.of<T>().max_pool_input_grad(shape, grad_output, positions, begin, end, grad_input);
  });
}

#define SWAT_INSTANTIATE(T)                                                                                           \
  template void max_pool(const KernelTable&, const Parallel&, const MaxPoolShape&, const T*, T*, uint8_t*);           \
  template void max_pool_backward(const KernelTable&, const Parallel&, const MaxPoolShape&, const T*, const uint8_t*, \
                                  T*);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
#undef SWAT_INSTANTIATE

}  // namespace swat::cpu
