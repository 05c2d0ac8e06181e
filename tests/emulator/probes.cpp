// Pieces of the CUDA kernels that tests look at alone, as operators of swat_ext_emulated.
#include "kernels/cuda/gather.h"
#include "kernels/cuda/look_back.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace swat::cuda {
namespace {

using torch::stable::Tensor;

// The emulator runs one block after the other, so here each warp of one block is a tile.
__global__ void find_sums(uint64_t* states, const int64_t* own, int64_t first, int64_t* before) {
  const int64_t tile = threadIdx.x / kWarp;
  const int64_t sum = look_back(states, first + tile, own[tile]);
  if (lane_id() == 0) before[tile] = sum;
}

// The sum before each of the tiles from `first` on, which keep `own`. `states` of the tiles before them are given.
Tensor look_back_probe(Tensor states, const Tensor& own, int64_t first) {
  Tensor before = torch::stable::empty_like(own);
  SWAT_LAUNCH(find_sums, 1, own.numel() * kWarp, 0, nullptr,
              reinterpret_cast<uint64_t*>(states.mutable_data_ptr<int64_t>()), own.const_data_ptr<int64_t>(), first,
              before.mutable_data_ptr<int64_t>());
  return before;
}

// plan_gather for axes of (outputs, step, span): (tile samples, height, width, patch, channels of a block, direct).
std::vector<int64_t> plan_gather_probe(int64_t batch, std::vector<int64_t> rows, std::vector<int64_t> columns,
                                       int64_t channels, int64_t element_bytes) {
  auto axis = [](const std::vector<int64_t>& of) {
    GatherAxis made{};
    made.outputs = of[0];
    made.step = of[1];
    made.span = of[2];
    return made;
  };
  const GatherPlan plan = plan_gather(batch, axis(rows), axis(columns), channels, element_bytes);
  return {plan.tile_samples, plan.tile_height, plan.tile_width, plan.patch, plan.block_channels, plan.direct ? 1 : 0};
}

// Which of a block's threads' variables in shared memory are not what they were: 0 where each block starts with fresh ones.
__global__ void read_shared(int64_t* found) {
  SWAT_DYNAMIC_SHARED(dynamic);
  SWAT_SHARED(fixed, double);
  SWAT_SHARED(whole, int[3]);
  if (threadIdx.x == 0) {
    const double in_dynamic = *reinterpret_cast<double*>(dynamic);
    if (fixed == fixed || in_dynamic == in_dynamic || whole[2] < 1 << 30) ++*found;
    fixed = whole[2] = 0;
    *reinterpret_cast<double*>(dynamic) = 0;
  }
  __syncthreads();
  if (fixed != 0 || whole[2] != 0) ++*found;
}

int64_t shared_probe(int64_t dynamic_bytes) {
  int64_t count = 0;
  int64_t* const found = &count;
  SWAT_LAUNCH(read_shared, 3, 64, dynamic_bytes, nullptr, found);
  return count;
}

}  // namespace
}  // namespace swat::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(swat_ext_emulated, m) {
  m.def("look_back(Tensor(a!) states, Tensor own, int first) -> Tensor");
  m.def("plan_gather(int batch, int[] rows, int[] columns, int channels, int element_bytes) -> int[]");
  m.def("shared_memory(int dynamic_bytes) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(swat_ext_emulated, CPU, m) { m.impl("look_back", TORCH_BOX(&swat::cuda::look_back_probe)); }
STABLE_TORCH_LIBRARY_IMPL(swat_ext_emulated, CompositeExplicitAutograd, m) {
  m.impl("plan_gather", TORCH_BOX(&swat::cuda::plan_gather_probe));
  m.impl("shared_memory", TORCH_BOX(&swat::cuda::shared_probe));
}
