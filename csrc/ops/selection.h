// Compression by a threshold that lives through training: what is the same on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"

namespace swat {

// Bring `threshold` up to date and compress with it. `clock`, on the CPU whatever the device: optimizer steps made, and the step of
// the last selection, below 0 before the first.
template <typename Kth, typename Compress>
std::tuple<Tensor, Tensor> select_by_clock(const Tensor& input, Tensor& threshold, Tensor& clock, int64_t keep,
                                           int64_t period, bool padded, Kth&& kth_magnitude, Compress&& compress) {
  STD_TORCH_CHECK(clock.is_cpu() && clock.scalar_type() == ScalarType::Long && clock.dim() == 1 && clock.size(0) == 2 &&
                      clock.is_contiguous(),
                  "clock: expected int64 of size [2] on the CPU, got size ", to_string(sizes(clock)));
  STD_TORCH_CHECK(threshold.dim() == 0, "threshold: expected no dimensions, got size ", to_string(sizes(threshold)));
  STD_TORCH_CHECK(period >= 1, "period: expected at least 1, got ", period);
  int64_t* const at = clock.mutable_data_ptr<int64_t>();
  if (input.numel() > 0 && (at[1] < 0 || at[0] - at[1] >= period)) {
    torch::stable::copy_(threshold, kth_magnitude(input, keep));
    at[1] = at[0];
  }
  // Under autocast an input may have another dtype than the weight, whose the threshold has.
  const bool same = threshold.scalar_type() == input.scalar_type();
  const Tensor limit = same ? threshold : torch::stable::to(threshold, input.scalar_type());
  return compress(input, limit, std::optional<int64_t>(keep), padded);
}

}  // namespace swat
