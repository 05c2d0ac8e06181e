// Compression by a threshold that lives through training: what is the same on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"

namespace swat {

// What a selection knows, int64 on the CPU whatever the device. It is a tensor, so that a compiled graph reads it anew at each call.
struct SelectionState {
  int64_t steps;      // optimizer steps made
  int64_t selected;   // the step of the last selection, below 0 before the first
  int64_t period;     // steps from one selection to the next
  int64_t numerator;  // the budget, as a share of the elements
  int64_t denominator;

  bool is_due() const { return selected < 0 || steps - selected >= period; }

  // ceil(numel * numerator / denominator); a decimal share has more digits than a product of 64 bits holds.
  int64_t keep(int64_t numel) const {
    const __int128 product = static_cast<__int128>(numel) * numerator;
    return static_cast<int64_t>((product + denominator - 1) / denominator);
  }
};

// Bring `threshold` up to date and compress with it.
template <typename Kth, typename Compress>
std::tuple<Tensor, Tensor> select_by_state(const Tensor& input, Tensor& threshold, Tensor& state,
                                           std::optional<int64_t> room, Kth&& kth_magnitude, Compress&& compress) {
  STD_TORCH_CHECK(state.is_cpu() && state.scalar_type() == ScalarType::Long && state.dim() == 1 && state.size(0) == 5 &&
                      state.is_contiguous(),
                  "state: expected int64 of size [5] on the CPU, got size ", to_string(sizes(state)));
  STD_TORCH_CHECK(threshold.dim() == 0, "threshold: expected no dimensions, got size ", to_string(sizes(threshold)));
  int64_t* const words = state.mutable_data_ptr<int64_t>();
  const SelectionState now{words[0], words[1], words[2], words[3], words[4]};
  STD_TORCH_CHECK(now.period >= 1, "state: expected a period of at least 1, got ", now.period);
  STD_TORCH_CHECK(now.numerator > 0 && now.numerator <= now.denominator, "state: expected a budget in (0, 1], got ",
                  now.numerator, " / ", now.denominator);
  const int64_t keep = now.keep(input.numel());
  if (keep == input.numel()) {
    // Exactly dense, whatever comes before the next selection: the least magnitude of today would drop smaller ones.
    torch::stable::zero_(threshold);
  } else if (now.is_due()) {
    torch::stable::copy_(threshold, kth_magnitude(input, keep));
  }
  if (input.numel() > 0 && now.is_due()) words[1] = now.steps;
  // Under autocast an input may have another dtype than the weight, whose the threshold has.
  const bool same = threshold.scalar_type() == input.scalar_type();
  const Tensor limit = same ? threshold : torch::stable::to(threshold, input.scalar_type());
  return compress(input, limit, std::optional<int64_t>(keep), room);
}

}  // namespace swat
