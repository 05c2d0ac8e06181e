#include "weight_grad_plan.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace swat::cpu {
namespace {

constexpr double kTileBytes = 24 << 10;       // dy of one tile, mostly in L1
constexpr double kSparseTileBytes = 1 << 10;  // and as much more for each 1 / density: short lists cost more than L2
constexpr double kMostTileBytes = 48 << 10;
constexpr double kLargestTileBytes = 512 << 20;  // where a dilated kernel takes more: offsets have 32 bits
constexpr int64_t kBatchBytes = 64 << 10;        // dy of the tiles packed together, one block of output channels, in L2
constexpr int64_t kListBytes = 256 << 10;        // their lists of activations
constexpr int64_t kDirectBytes = 256 << 10;      // the same where all tiles are packed together
constexpr int64_t kDirectListBytes = 2 << 20;
constexpr int64_t kReadBytes = 128;            // of one pixel of dy at once: neighbouring cache lines
constexpr int64_t kPartialElements = 1 << 20;  // sums kept apart, all slices together
constexpr int64_t kMostSlices = 8;
constexpr int64_t kRunTaps = 3;        // taps a run has along one axis at most
constexpr int64_t kHaloColumns = 256;  // of a tile, where a wide kernel reads more around it than in it
constexpr int64_t kLongRow = 4096;     // columns of a tile at most

// The taps that an input coordinate with one remainder modulo the stride meets, and where its gradient lies.
struct AxisTap {
  int64_t tap;
  int64_t grad;  // output coordinate, relative to coordinate / stride
};

std::vector<std::vector<AxisTap>> axis_taps(int64_t taps, int64_t stride, int64_t dilation, int64_t pad) {
  std::vector<std::vector<AxisTap>> found(stride);
  for (int64_t residue = 0; residue < stride; ++residue) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t at = residue + pad - tap * dilation;
      if (at % stride == 0) found[residue].push_back({tap, at / stride});
    }
  }
  return found;
}

struct Range {
  int64_t least = 0, most = 0;
};

Range grad_range(const std::vector<std::vector<AxisTap>>& residues) {
  Range range{INT64_MAX, INT64_MIN};
  for (const auto& taps : residues) {
    for (const AxisTap& tap : taps) {
      range.least = std::min(range.least, tap.grad);
      range.most = std::max(range.most, tap.grad);
    }
  }
  return range;
}

void plan_classes(const ConvGeometry& g, const std::vector<std::vector<AxisTap>>& rows,
                  const std::vector<std::vector<AxisTap>>& columns, WeightGradPlan& plan) {
  for (const auto& row_taps : rows) {
    for (const auto& column_taps : columns) {
      TapClass tap_class;
      tap_class.run_begin = static_cast<int32_t>(plan.runs.size());
      for (size_t r = 0; r < row_taps.size(); r += kRunTaps) {
        for (size_t c = 0; c < column_taps.size(); c += kRunTaps) {
          TapRun run{};
          run.rows = static_cast<int32_t>(std::min<size_t>(kRunTaps, row_taps.size() - r));
          run.columns = static_cast<int32_t>(std::min<size_t>(kRunTaps, column_taps.size() - c));
          run.tap = static_cast<int32_t>(row_taps[r].tap * g.kernel_width + column_taps[c].tap);
          run.pixel = static_cast<int32_t>((row_taps[r].grad - plan.origin_row) * plan.grad_columns +
                                           column_taps[c].grad - plan.origin_column);
          // Taps of one remainder are evenly spaced, in the kernel and in dy.
          if (run.rows > 1) {
            run.tap_row_step = static_cast<int32_t>((row_taps[r + 1].tap - row_taps[r].tap) * g.kernel_width);
            run.row_step = static_cast<int32_t>((row_taps[r + 1].grad - row_taps[r].grad) * plan.grad_columns);
          }
          if (run.columns > 1) {
            run.tap_column_step = static_cast<int32_t>(column_taps[c + 1].tap - column_taps[c].tap);
            run.column_step = static_cast<int32_t>(column_taps[c + 1].grad - column_taps[c].grad);
          }
          plan.runs.push_back(run);
        }
      }
      tap_class.run_end = static_cast<int32_t>(plan.runs.size());
      plan.classes.push_back(tap_class);
    }
  }
}

}  // namespace

int64_t even_cut(int64_t whole, int64_t most) {
  most = std::clamp<int64_t>(most, 1, std::max<int64_t>(whole, 1));
  return ceil_div(std::max<int64_t>(whole, 1), ceil_div(std::max<int64_t>(whole, 1), most));
}

int64_t fitting_slices(int64_t tiles, int64_t elements) {
  const int64_t most = std::min(kMostSlices, std::max<int64_t>(tiles, 1));
  return std::clamp<int64_t>(kPartialElements / elements, 1, most);
}

WeightGradPlan plan_weight_grad(const ConvGeometry& g, int64_t element_bytes, int64_t lanes,
                                int64_t (*most_vectors)(int64_t taps), double density) {
  WeightGradPlan plan;
  const auto rows = axis_taps(g.kernel_height, g.stride_height, g.dilation_height, g.pad_top);
  const auto columns = axis_taps(g.kernel_width, g.stride_width, g.dilation_width, g.pad_left);
  const Range row_range = grad_range(rows), column_range = grad_range(columns);
  plan.origin_row = row_range.least;
  plan.origin_column = column_range.least;
  const int64_t halo_rows = row_range.most - row_range.least, halo_columns = column_range.most - column_range.least;

  int64_t row_taps = 1, column_taps = 1;
  for (const auto& taps : rows) row_taps = std::max<int64_t>(row_taps, std::min<int64_t>(kRunTaps, taps.size()));
  for (const auto& taps : columns)
    column_taps = std::max<int64_t>(column_taps, std::min<int64_t>(kRunTaps, taps.size()));
  plan.vectors = most_vectors(row_taps * column_taps);
  while (plan.vectors > 1 && plan.vectors / 2 * lanes >= g.group_out()) plan.vectors /= 2;

  // A row of pixels, and what the kernel reads around them.
  auto least_bytes = [&] {
    return (1.0 + static_cast<double>(halo_rows)) * static_cast<double>(kHaloColumns + halo_columns) *
           static_cast<double>(plan.vectors * lanes * element_bytes);
  };
  while (plan.vectors > 1 && least_bytes() > kLargestTileBytes) plan.vectors /= 2;
  if (least_bytes() > kLargestTileBytes) {
    throw std::invalid_argument(
        "dilation: the weight gradient takes dilated kernels of at most 2^29 bytes of output gradients, got " +
        std::to_string(g.kernel_height) + "x" + std::to_string(g.kernel_width) + " taps with dilation [" +
        std::to_string(g.dilation_height) + ", " + std::to_string(g.dilation_width) + "]");
  }

  // Tiles: whole rows if they fit, then as many rows as fit, then as many samples.
  const int64_t pixel_bytes = plan.vectors * lanes * element_bytes;
  const int64_t height = ceil_div(g.in_height, g.stride_height), width = ceil_div(g.in_width, g.stride_width);
  const double tile_bytes = std::min(kTileBytes + kSparseTileBytes / std::max(density, 1e-3), kMostTileBytes);
  const int64_t pixels = std::max<int64_t>(static_cast<int64_t>(tile_bytes) / pixel_bytes, 1);
  const int64_t widest =
      std::max<int64_t>({pixels / (1 + halo_rows) - halo_columns, std::min(2 * halo_columns, kHaloColumns), 8});
  plan.tile_columns = even_cut(width, std::min(widest, kLongRow));
  plan.grad_columns = plan.tile_columns + halo_columns;
  plan.tile_rows = even_cut(height, pixels / plan.grad_columns - halo_rows);
  plan.grad_rows = plan.tile_rows + halo_rows;
  const bool whole_image = plan.tile_rows == height && plan.tile_columns == width;
  plan.tile_samples = whole_image ? even_cut(g.batch, pixels / (plan.grad_rows * plan.grad_columns)) : 1;
  plan.tiles_n = ceil_div(g.batch, plan.tile_samples);
  plan.tiles_h = ceil_div(height, plan.tile_rows);
  plan.tiles_w = ceil_div(width, plan.tile_columns);

  for (int64_t r = 0; r < plan.tile_rows * g.stride_height; ++r) {
    for (int64_t c = 0; c < plan.tile_columns * g.stride_width; ++c) {
      plan.pixel.push_back(static_cast<int32_t>(r / g.stride_height * plan.grad_columns + c / g.stride_width));
    }
  }
  plan_classes(g, rows, columns, plan);
  if (plan.classes.size() > 1) {
    for (int64_t r = 0; r < plan.tile_rows * g.stride_height; ++r) {
      for (int64_t c = 0; c < plan.tile_columns * g.stride_width; ++c) {
        plan.pixel_class.push_back(static_cast<uint16_t>(r % g.stride_height * g.stride_width + c % g.stride_width));
      }
    }
  }

  const int64_t grad_bytes = plan.tile_samples * plan.grad_rows * plan.grad_columns * pixel_bytes;
  const double activations = static_cast<double>(plan.pixel.size() * plan.tile_samples * g.in_channels);
  const double list_bytes = activations * std::max(density, 1e-3) * 2 * static_cast<double>(element_bytes);
  const int64_t tiles = plan.tiles_n * plan.tiles_h * plan.tiles_w;
  const int64_t width_elements = plan.vectors * lanes, blocks = ceil_div(g.group_out(), width_elements);
  const int64_t elements = g.groups * blocks * width_elements * g.group_in() * g.taps();
  plan.slices = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(fitting_slices(tiles, elements))));

  // A large dW is better finished in one go than visited once a batch.
  plan.direct = plan.slices == 1 && tiles * grad_bytes <= kDirectBytes &&
                static_cast<double>(tiles) * list_bytes <= kDirectListBytes;
  const int64_t listed = plan.direct ? tiles : static_cast<int64_t>(kListBytes / list_bytes);
  plan.batch_tiles = plan.direct ? tiles : std::min(kBatchBytes / grad_bytes, listed);
  plan.batch_tiles = std::clamp<int64_t>(plan.batch_tiles, 1, std::max<int64_t>(tiles, 1));
  // A channel's values and bits lie far from the next one's: long visits let them stream.
  plan.listed_tiles = std::max<int64_t>(listed / plan.batch_tiles, 1) * plan.batch_tiles;
  const int64_t block_bytes = width_elements * element_bytes;
  plan.blocks_together = std::clamp<int64_t>(kReadBytes / block_bytes, 1, blocks);
  return plan;
}

}  // namespace swat::cpu
