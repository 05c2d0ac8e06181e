#include "relu.h"

namespace swat::cpu {
namespace {

constexpr int64_t kGrainWords = 1 << 9;  // below this a thread costs more than it saves

}  // namespace

template <typename T>
void relu(const KernelTable& table, const Parallel& parallel, const T* input, int64_t numel, T* output,
          uint64_t* words) {
  parallel(ceil_div(numel, 64), kGrainWords,
           [&](int64_t begin, int64_t end) { table.of<T>().relu_words(input, numel, begin, end, output, words); });
}

template <typename T>
void relu_backward(const KernelTable& table, const Parallel& parallel, const T* grad_output, const uint64_t* words,
                   int64_t numel, T* grad_input) {
  parallel(ceil_div(numel, 64), kGrainWords, [&](int64_t begin, int64_t end) {
    table.of<T>().mask_words(grad_output, words, numel, begin, end, grad_input);
  });
}

#define SWAT_INSTANTIATE(T)                                                                  \
  template void relu(const KernelTable&, const Parallel&, const T*, int64_t, T*, uint64_t*); \
  template void relu_backward(const KernelTable&, const Parallel&, const T*, const uint64_t*, int64_t, T*);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
#undef SWAT_INSTANTIATE

}  // namespace swat::cpu
