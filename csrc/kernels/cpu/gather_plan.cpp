#include "gather_plan.h"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace swat::cpu {
namespace {

constexpr int64_t kTileBytes =
    256 << 20;  // at most, of channels together: offsets have 32 bits, and each thread has a tile
constexpr int64_t kBlockChannels[] = {8, 16, 32, 64, 128, kMostBlockChannels};
constexpr int64_t kStackedTiles[] = {1, 2, 4};
// Of the caches of one core, what a tile may take: lists and sums pass through them too.
constexpr double kL1Share = 0.875, kL2Share = 0.75;
constexpr int64_t kSumsBytes = 192 << 10;  // finished rows of one tile, kept in L2

// Bytes of the data caches of one core, those of Zen 3 where the system does not say.
struct CacheSizes {
  double l1 = size_of(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
  double l2 = size_of(_SC_LEVEL2_CACHE_SIZE, 512 << 10);

  static double size_of(int name, int64_t otherwise) {
    const int64_t found = sysconf(name);
    return static_cast<double>(found > 0 ? found : otherwise);
  }
};

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Cut the channels in blocks of at most `block_channels`, inside a group or over whole groups.
void block_channels(const GatherShape& shape, GatherPlan& plan) {
  plan.blocks_per_group = std::max<int64_t>(1, ceil_div(shape.group_channels, plan.block_channels));
  plan.groups_per_block =
      plan.blocks_per_group > 1 ? 1 : std::max<int64_t>(1, plan.block_channels / shape.group_channels);
  plan.groups_per_block = std::min(plan.groups_per_block, shape.groups);
  plan.block_channels = std::min(plan.block_channels, plan.groups_per_block * shape.group_channels);
  for (int64_t group = 0; group < shape.groups; group += plan.groups_per_block) {
    const int64_t group_end = std::min(shape.groups, group + plan.groups_per_block);
    for (int64_t k = 0; k < plan.blocks_per_group; ++k) {
      ChannelBlock block;
      block.channel_begin = group * shape.group_channels + k * plan.block_channels;
      block.channel_end = std::min(group_end * shape.group_channels, block.channel_begin + plan.block_channels);
      if (plan.blocks_per_group > 1) {
        block.channel_end = std::min(block.channel_end, (group + 1) * shape.group_channels);
      }
      block.row_begin = group * shape.group_rows;
      block.row_end = group_end * shape.group_rows;
      block.list = plan.lists;
      block.first = k == 0;
      plan.lists += block.row_end - block.row_begin;
      plan.blocks.push_back(block);
    }
  }
}

// Cycles of one thread for the whole problem, roughly: enough to rank the candidates.
double estimate(const GatherShape& shape, const GatherPlan& plan, const RegisterTile& registers) {
  const double lanes = static_cast<double>(shape.vector_bytes) / shape.element_bytes;
  const double rows = static_cast<double>(shape.groups * shape.group_rows);
  const double channels = static_cast<double>(shape.groups * shape.group_channels);
  const double tiles = static_cast<double>(
      ceil_div(ceil_div(shape.out_height, plan.tile_height) * ceil_div(shape.out_width, plan.tile_width) * shape.batch,
               static_cast<int64_t>(lanes)));
  const double pixels = static_cast<double>(registers.height * registers.width);
  const double stacked = static_cast<double>(plan.tile_height) / registers.height;
  const double packed = static_cast<double>(plan.rows.source.size() * plan.columns.source.size());
  const double block_bytes = static_cast<double>(plan.block_channels) * packed * shape.vector_bytes;
  const double blocks = channels / static_cast<double>(plan.block_channels);
  const double visits = static_cast<double>(ceil_div(shape.group_channels, plan.block_channels)) * rows;

  static const CacheSizes caches;
  // A load of 64 bytes costs two of 32 on Zen 4, the one processor with such vectors that was measured.
  const double width = shape.vector_bytes == 64 ? 2 : 1;
  const double load_cost = width * (block_bytes <= kL1Share * caches.l1   ? 0.55
                                    : block_bytes <= kL2Share * caches.l2 ? 0.9
                                                                          : 2.0);
  const double multiply = static_cast<double>(shape.entries) * stacked * (pixels * load_cost + 1.2);
  const double sums = visits * (8 + stacked * (6 + 1.6 * pixels));
  const double pack = packed * (channels * (1.0 + 0.4 * lanes) + blocks * 2.5 * lanes);
  const double store = pixels * stacked * rows * (1.0 + 0.4 * lanes);
  return tiles * (multiply + sums + pack + store);
}

}  // namespace

PackedAxis pack_axis(int64_t tile, int64_t step, const std::vector<int64_t>& taps) {
  auto remainder = [step](int64_t tap) { return tap - floor_div(tap, step) * step; };
  std::vector<size_t> order;
  for (size_t i = 0; i < taps.size(); ++i) {
    if (taps[i] != kNoTap) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::pair(remainder(taps[a]), taps[a]) < std::pair(remainder(taps[b]), taps[b]);
  });
  PackedAxis axis;
  axis.tap.assign(taps.size(), -1);
  int64_t last = kNoTap;
  for (size_t i : order) {
    const int64_t tap = taps[i];
    int64_t first = tap;  // first coordinate that is not laid out yet
    if (last != kNoTap && remainder(last) == remainder(tap)) first = std::max(tap, last + tile * step);
    last = tap;
    // Coordinates that the tap before has laid out are the last ones there are, so its position follows from the end.
    for (int64_t at = first; at < tap + tile * step; at += step) axis.source.push_back(at);
    axis.tap[i] = static_cast<int32_t>(axis.source.size() - tile);
  }
  // A pass without taps still has outputs to write: give it one pixel, which nothing reads.
  if (axis.source.empty()) axis.source.push_back(0);
  return axis;
}

GatherPlan plan_gather(const GatherShape& shape, const RegisterTile* tiles, int tile_count, int64_t threads) {
  GatherPlan best;
  double best_cost = std::numeric_limits<double>::infinity();
  for (int i = 0; i < tile_count; ++i) {
    for (int64_t stacked : kStackedTiles) {
      GatherPlan plan;
      plan.shape = i;
      plan.tile_height = tiles[i].height * stacked;
      plan.tile_width = tiles[i].width;
      if (stacked > 1 && plan.tile_height >= shape.out_height + tiles[i].height) continue;
      plan.rows = pack_axis(plan.tile_height, shape.step_h, shape.row_taps);
      plan.columns = pack_axis(plan.tile_width, shape.step_w, shape.column_taps);
      const int64_t channel_bytes =
          static_cast<int64_t>(plan.rows.source.size() * plan.columns.source.size()) * shape.vector_bytes;
      const int64_t most = std::max(kTileBytes / channel_bytes, int64_t{channel_bytes <= INT32_MAX});
      for (int64_t channels : kBlockChannels) {
        plan.block_channels = std::min(channels, most);
        if (most == 0) break;
        const double cost = estimate(shape, plan, tiles[i]);
        if (cost < best_cost) {
          best_cost = cost;
          best = plan;
        }
        if (channels >= std::min(most, shape.group_channels * shape.groups)) break;
      }
    }
  }
  if (best_cost == std::numeric_limits<double>::infinity()) {
    throw std::invalid_argument(
        "weight_size: expected a kernel that reads at most 2^31 bytes of a channel in one tile, got " +
        std::to_string(shape.row_taps.size()) + "x" + std::to_string(shape.column_taps.size()) + " taps");
  }
  block_channels(shape, best);

  const int64_t lanes = shape.vector_bytes / shape.element_bytes;
  const int64_t rows = shape.groups * shape.group_rows;
  const int64_t vectors = ceil_div(
      ceil_div(shape.out_height, best.tile_height) * ceil_div(shape.out_width, best.tile_width) * shape.batch, lanes);
  const int64_t row_bytes = best.tile_height * best.tile_width * shape.vector_bytes;
  int64_t chunk = std::max<int64_t>(lanes, kSumsBytes / row_bytes / lanes * lanes);
  // Where tiles are fewer than threads, threads share a tile's rows.
  const int64_t wanted = ceil_div(2 * threads, std::max<int64_t>(1, vectors));
  if (vectors < 2 * threads) chunk = std::min(chunk, std::max(lanes, ceil_div(ceil_div(rows, wanted), lanes) * lanes));
  best.row_chunk = std::max<int64_t>(1, std::min(chunk, rows));
  return best;
}

}  // namespace swat::cpu
