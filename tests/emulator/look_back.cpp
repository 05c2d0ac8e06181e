// look_back alone, with tiles that run at the same time: the emulator runs one block after the other, so here each warp of one
// block is a tile.
#include "kernels/cuda/look_back.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace swat::cuda {
namespace {

__global__ void find_sums(uint64_t* states, const int64_t* own, int64_t first, int64_t* before) {
  const int64_t tile = threadIdx.x / kWarp;
  const int64_t sum = look_back(states, first + tile, own[tile]);
  if (lane_id() == 0) before[tile] = sum;
}

// The sum before each of the tiles from `first` on, which keep `own`. `states` of the tiles before them are given.
torch::stable::Tensor look_back_probe(torch::stable::Tensor states, const torch::stable::Tensor& own, int64_t first) {
  torch::stable::Tensor before = torch::stable::empty_like(own);
  SWAT_LAUNCH(find_sums, 1, own.numel() * kWarp, 0, nullptr,
              reinterpret_cast<uint64_t*>(states.mutable_data_ptr<int64_t>()), own.const_data_ptr<int64_t>(), first,
              before.mutable_data_ptr<int64_t>());
  return before;
}

}  // namespace
}  // namespace swat::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(swat_ext_emulated, m) {
  m.def("look_back(Tensor(a!) states, Tensor own, int first) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(swat_ext_emulated, CPU, m) { m.impl("look_back", TORCH_BOX(&swat::cuda::look_back_probe)); }
