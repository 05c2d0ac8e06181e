// Planning of the gather kernel (gather_conv.inl): which pixels a tile needs, how channels are blocked, which tile is cheapest.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace swat::cpu {

// No input coordinate: the tap is not part of this pass.
inline constexpr int64_t kNoTap = INT64_MIN;

// One axis of a packed tile.
struct PackedAxis {
  std::vector<int64_t> source;  // input coordinate of each packed position, relative to the tile
  std::vector<int32_t> tap;     // packed position of each tap for the tile's first output; -1 for kNoTap
};

// Lay out the coordinates `step * i + taps[k]`, i in [0, tile), so that the next output is always the next position: coordinates
// are sorted by their remainder modulo the step, and those that no tap meets are left out.
PackedAxis pack_axis(int64_t tile, int64_t step, const std::vector<int64_t>& taps);

// What the choice of a tile depends on.
struct GatherShape {
  int64_t batch, out_height, out_width;
  int64_t step_h, step_w;
  std::vector<int64_t> row_taps, column_taps;  // input coordinate of each tap for output 0
  int64_t groups, group_channels, group_rows;  // channels are summed over, rows are computed
  int64_t entries;                             // non-zero weights, about
  int64_t element_bytes, vector_bytes;
};

struct GatherPlan {
  int shape = 0;  // index into the register tiles
  int64_t tile_height = 1, tile_width = 1;
  PackedAxis rows, columns;
  int64_t block_channels = 1;
  int64_t row_chunk = 1;
  std::vector<ChannelBlock> blocks;
  int64_t blocks_per_group = 1, groups_per_block = 1;
  int64_t lists = 0;
};

// The plan with the least estimated time among those whose tile fits 32-bit offsets. It changes no result: every output sums the same products in the same order under any.
GatherPlan plan_gather(const GatherShape& shape, const RegisterTile* tiles, int tile_count, int64_t threads);

}  // namespace swat::cpu
