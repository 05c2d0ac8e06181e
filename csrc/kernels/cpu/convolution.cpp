#include "convolution.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <utility>
#include <vector>

#include "buffer.h"
#include "gather_plan.h"

namespace swat::cpu {
namespace {

constexpr int64_t kGrainLists = 1 << 10;  // fewer are looked at by one thread

// One run of the gather kernel.
template <typename T>
struct GatherProblem {
  ImageView<const T> input;
  ImageView<T> output;
  int64_t step_h, step_w;
  std::vector<int64_t> row_taps,
      column_taps;  // input coordinate of each row and column of the kernel for output 0, or kNoTap
  const T* bias;
  bool backward;  // rows of output are the weight's input channels
};

// A 1x1 convolution without stride sees no neighbours: join axes that lie evenly in both images, so that no tile is cut short.
template <typename T>
void join_axes(GatherProblem<T>& problem) {
  auto& in = problem.input;
  auto& out = problem.output;
  const bool pointwise = problem.row_taps == std::vector<int64_t>{0} &&
                         problem.column_taps == std::vector<int64_t>{0} && problem.step_h == 1 && problem.step_w == 1;
  // Padding behind the image alone leaves the taps where they are.
  if (!pointwise || in.height != out.height || in.width != out.width) return;
  if (!rows_join(in) || !rows_join(out)) return;
  join_rows(in);
  join_rows(out);
  if (in.batch_stride != in.row_stride || out.batch_stride != out.row_stride) return;
  auto join_batch = [](auto& image) {
    image.width *= image.batch;
    image.batch = 1;
    image.row_stride = image.batch_stride = image.width * image.column_stride;
  };
  join_batch(in);
  join_batch(out);
}

template <typename T>
void run_gather(const KernelTable& table, const Parallel& parallel, const ConvGeometry& geometry,
                const PackedView<T>& weight, GatherProblem<T> problem) {
  const Kernels<T>& kernels = table.of<T>();
  join_axes(problem);
  if (problem.output.batch * problem.output.height * problem.output.width == 0) return;

  GatherShape shape;
  shape.batch = problem.output.batch;
  shape.out_height = problem.output.height;
  shape.out_width = problem.output.width;
  shape.step_h = problem.step_h;
  shape.step_w = problem.step_w;
  shape.row_taps = problem.row_taps;
  shape.column_taps = problem.column_taps;
  shape.groups = geometry.groups;
  shape.group_channels = problem.backward ? geometry.group_out() : geometry.group_in();
  shape.group_rows = problem.backward ? geometry.group_in() : geometry.group_out();
  const int64_t last_block = (weight.numel - 1) / kBlockBits;
  shape.entries = weight.ranks[last_block];  // all but the last block's
  shape.element_bytes = sizeof(T);
  shape.vector_bytes = table.vector_bytes;
  const GatherPlan plan = plan_gather(shape, table.register_tiles, table.register_tile_count, parallel.threads);

  // Where each element of one group's slice of the weight finds its pixel, relative to the start of its channel block.
  const int64_t taps = geometry.taps(), group_in = geometry.group_in();
  const int64_t packed_width = plan.columns.source.size();
  const int64_t pixel_bytes = table.vector_bytes;
  const int64_t channel_bytes = static_cast<int64_t>(plan.rows.source.size()) * packed_width * pixel_bytes;
  std::vector<int32_t> element_offset(group_in * taps), element_row(problem.backward ? group_in * taps : 0);
  for (int64_t element = 0; element < group_in * taps; ++element) {
    const int64_t channel = element / taps, tap = element % taps;
    const int32_t row = plan.rows.tap[tap / geometry.kernel_width],
                  column = plan.columns.tap[tap % geometry.kernel_width];
    const int64_t in_block = problem.backward ? 0 : channel % plan.block_channels * channel_bytes;
    if (problem.backward) element_row[element] = static_cast<int32_t>(channel);
    element_offset[element] = row < 0 || column < 0
                                  ? WeightListParams<T>::kAbsent
                                  : static_cast<int32_t>(in_block + (row * packed_width + column) * pixel_bytes);
  }

  // starts[i + 1] is where list i begins while lists are filled, and where it ends afterwards.
  std::vector<int64_t> starts(plan.lists + 2, 0);
  WeightListParams<T> lists;
  lists.weight = weight;
  lists.group_in = group_in;
  lists.group_out = geometry.group_out();
  lists.taps = taps;
  lists.element_offset = element_offset.data();
  lists.element_row = element_row.data();
  lists.channel_bytes = channel_bytes;
  lists.blocks = plan.blocks.data();
  lists.blocks_per_group = plan.blocks_per_group;
  lists.groups_per_block = plan.groups_per_block;
  lists.block_channels = plan.block_channels;
  const int64_t units = problem.backward ? static_cast<int64_t>(plan.blocks.size()) : geometry.out_channels;
  lists.starts = starts.data() + 1;
  parallel(units, 1, [&](int64_t begin, int64_t end) {
    (problem.backward ? kernels.count_backward_lists : kernels.count_forward_lists)(lists, begin, end);
  });
  int64_t total = 0;
  for (int64_t i = 1; i <= plan.lists; ++i) total += std::exchange(starts[i], total);
  starts[plan.lists + 1] = total;
  Buffer<GatherEntry<T>> entries(total);
  lists.entries = entries.data();
  parallel(units, 1, [&](int64_t begin, int64_t end) {
    (problem.backward ? kernels.fill_backward_lists : kernels.fill_forward_lists)(lists, begin, end);
  });

  GatherParams<T> params;
  params.input = problem.input;
  params.output = problem.output;
  params.step_h = problem.step_h;
  params.step_w = problem.step_w;
  params.bias = problem.bias;
  params.tile_rows = plan.rows.source.data();
  params.tile_columns = plan.columns.source.data();
  params.packed_height = plan.rows.source.size();
  params.packed_width = packed_width;
  params.shape = plan.shape;
  params.tile_height = plan.tile_height;
  params.tile_width = plan.tile_width;
  params.blocks = plan.blocks.data();
  params.block_count = plan.blocks.size();
  params.block_channels = plan.block_channels;
  params.starts = problem.backward ? starts.data() : starts.data() + 1;
  params.entries = entries.data();
  params.run = 0;
  // Whole kernels come as runs: ascending, and descending in the input gradient, which turns them around.
  for (int run : {1, -1}) {
    if (geometry.kernel_width != kRunWeights || params.run != 0) break;
    std::atomic<bool> all = true;
    parallel(plan.lists, kGrainLists, [&](int64_t begin, int64_t end) {
      if (!kernels.are_runs(params.entries, params.starts, begin, end, run * pixel_bytes)) all = false;
    });
    if (all) params.run = run;
  }
  params.row_chunk = plan.row_chunk;
  parallel(kernels.gather_tasks(params), 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(kernels.gather_scratch(params));
    kernels.gather_tiles(params, begin, end, scratch.data());
  });
}

// Input coordinates, relative to `residue + stride * m`, that the taps of an axis send gradient from: for each residue that meets a tap,
// in order.
std::map<int64_t, std::vector<int64_t>> residues(int64_t pixels, int64_t taps, int64_t stride, int64_t dilation,
                                                 int64_t pad) {
  std::map<int64_t, std::vector<int64_t>> found;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t ahead = (tap * dilation - pad) % stride, residue = ahead < 0 ? ahead + stride : ahead;
    if (residue >= pixels) continue;
    auto& of_residue = found[residue];
    of_residue.resize(taps, kNoTap);
    of_residue[tap] = (residue + pad - tap * dilation) / stride;
  }
  return found;
}

template <typename T>
void fill_zeros(const Parallel& parallel, const ImageView<T>& image) {
  parallel(image.batch * image.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* const data = image.data + row / image.height * image.batch_stride + row % image.height * image.row_stride;
      const bool across = image.channel_stride < image.column_stride;
      const int64_t outer = across ? image.width : image.channels, inner = across ? image.channels : image.width;
      const int64_t outer_stride = across ? image.column_stride : image.channel_stride;
      const int64_t inner_stride = across ? image.channel_stride : image.column_stride;
      for (int64_t i = 0; i < outer; ++i) {
        for (int64_t j = 0; j < inner; ++j) data[i * outer_stride + j * inner_stride] = 0;
      }
    }
  });
}

std::vector<int64_t> forward_taps(int64_t taps, int64_t dilation, int64_t pad) {
  std::vector<int64_t> found;
  for (int64_t tap = 0; tap < taps; ++tap) found.push_back(tap * dilation - pad);
  return found;
}

}  // namespace

template <typename T>
void convolution(const KernelTable& table, const Parallel& parallel, const ConvGeometry& g,
                 const ImageView<const T>& input, const PackedView<T>& weight, const T* bias,
                 const ImageView<T>& output) {
  run_gather<T>(table, parallel, g, weight,
                {.input = input,
                 .output = output,
                 .step_h = g.stride_height,
                 .step_w = g.stride_width,
                 .row_taps = forward_taps(g.kernel_height, g.dilation_height, g.pad_top),
                 .column_taps = forward_taps(g.kernel_width, g.dilation_width, g.pad_left),
                 .bias = bias,
                 .backward = false});
}

template <typename T>
void convolution_input_grad(const KernelTable& table, const Parallel& parallel, const ConvGeometry& g,
                            const ImageView<const T>& grad_output, const PackedView<T>& weight,
                            const ImageView<T>& grad_input) {
  // Inputs whose coordinates agree modulo the stride meet the same taps: each such part is a convolution without stride.
  const auto rows = residues(g.in_height, g.kernel_height, g.stride_height, g.dilation_height, g.pad_top);
  const auto columns = residues(g.in_width, g.kernel_width, g.stride_width, g.dilation_width, g.pad_left);
  const bool all = rows.size() == static_cast<size_t>(std::min(g.stride_height, g.in_height)) &&
                   columns.size() == static_cast<size_t>(std::min(g.stride_width, g.in_width));
  if (!all) fill_zeros(parallel, grad_input);
  for (const auto& [i, row_taps] : rows) {
    for (const auto& [j, column_taps] : columns) {
      ImageView<T> part = grad_input;
      part.data += i * part.row_stride + j * part.column_stride;
      part.height = (g.in_height - i + g.stride_height - 1) / g.stride_height;
      part.width = (g.in_width - j + g.stride_width - 1) / g.stride_width;
      part.row_stride *= g.stride_height;
      part.column_stride *= g.stride_width;
      run_gather<T>(table, parallel, g, weight,
                    {.input = grad_output,
                     .output = part,
                     .step_h = 1,
                     .step_w = 1,
                     .row_taps = row_taps,
                     .column_taps = column_taps,
                     .bias = nullptr,
                     .backward = true});
    }
  }
}

template void convolution(const KernelTable&, const Parallel&, const ConvGeometry&, const ImageView<const float>&,
                          const PackedView<float>&, const float*, const ImageView<float>&);
template void convolution(const KernelTable&, const Parallel&, const ConvGeometry&, const ImageView<const double>&,
                          const PackedView<double>&, const double*, const ImageView<double>&);
template void convolution_input_grad(const KernelTable&, const Parallel&, const ConvGeometry&,
                                     const ImageView<const float>&, const PackedView<float>&, const ImageView<float>&);
template void convolution_input_grad(const KernelTable&, const Parallel&, const ConvGeometry&,
                                     const ImageView<const double>&, const PackedView<double>&,
                                     const ImageView<double>&);

}  // namespace swat::cpu
