// The sparse convolution as both passes see it: rows of output gather from channels of input, along lists of non-zero weights.
//
// Forward, rows are output channels and channels are input channels. In the input gradient it is the reverse, and inputs whose
// coordinates agree modulo the stride meet the same taps: each such part is a gather of its own, without stride.
#pragma once

#include "params.h"

namespace swat::cuda {

// One axis: output i reads input i * step + coordinate(tap) for each tap that is present.
struct GatherAxis {
  int64_t outputs, inputs, taps;
  int64_t step;
  int64_t stride, dilation, pad;
  int64_t residue;  // input gradient: outputs are residue + stride * i; forward: -1
  // Coordinates fit in 32 bits, and a 64-bit division on the device is a slow call.
  int64_t lowest, span;  // of the present taps' coordinates: the first, and how many to the last; no tap: span 0

  SWAT_HOST_DEVICE bool present(int64_t tap) const {
    return residue < 0 || static_cast<int32_t>(residue + pad - tap * dilation) % static_cast<int32_t>(stride) == 0;
  }
  SWAT_HOST_DEVICE int64_t coordinate(int64_t tap) const {
    return residue < 0 ? tap * dilation - pad
                       : static_cast<int32_t>(residue + pad - tap * dilation) / static_cast<int32_t>(stride);
  }
};

inline GatherAxis find_span(GatherAxis axis) {
  bool any = false;
  int64_t low = 0, high = 0;
  for (int64_t tap = 0; tap < axis.taps; ++tap) {
    if (!axis.present(tap)) continue;
    const int64_t at = axis.coordinate(tap);
    low = !any || at < low ? at : low;
    high = !any || at > high ? at : high;
    any = true;
  }
  axis.lowest = low;
  axis.span = any ? high - low + 1 : 0;
  return axis;
}

inline GatherAxis forward_axis(int64_t inputs, int64_t outputs, int64_t taps, int64_t stride, int64_t dilation,
                               int64_t pad) {
  return find_span({outputs, inputs, taps, stride, stride, dilation, pad, -1, 0, 0});
}

// The part of an input gradient at `residue`: `inputs` counts gradients of the output here.
inline GatherAxis backward_axis(int64_t inputs, int64_t size, int64_t taps, int64_t stride, int64_t dilation,
                                int64_t pad, int64_t residue) {
  return find_span({ceil_div(size - residue, stride), inputs, taps, 1, stride, dilation, pad, residue, 0, 0});
}

template <typename T>
struct GatherEntry {
  Compute<T> weight;
  int32_t offset;  // channel * patch + where the tap lies in a patch; direct kernel: channel * taps + tap
};

inline constexpr int64_t kMostExtent = INT32_MAX / 4;  // of an axis, with its padding
inline constexpr int kGatherThreads = 256;
inline constexpr int kGatherWarps = kGatherThreads / kWarp;
inline constexpr int kGatherPixels = 8;                    // of one lane
inline constexpr int kGatherTile = kGatherPixels * kWarp;  // output pixels of a block
inline constexpr int64_t kPatchBytes = 33 << 10;           // shared memory for input, of 48 KB at most

// Output rows of one warp. They live in registers, kGatherPixels each.
template <typename T>
SWAT_HOST_DEVICE constexpr int gather_rows() {
  return sizeof(Compute<T>) == 4 ? 8 : 4;
}

struct GatherPlan {
  int64_t tile_samples, tile_height, tile_width;
  int64_t tiles_n, tiles_h, tiles_w;
  int64_t patch_height, patch_width;
  int64_t patch;           // elements from one channel of a tile's input to the next
  int64_t block_channels;  // channels in shared memory together
  bool direct;             // no patch fits: read global memory instead
  int64_t tiles() const { return tiles_n * tiles_h * tiles_w; }
};

// The longest piece where `length` is cut as evenly as can be, in pieces of at most `most`; 0 where that is 0.
inline int64_t even_piece(int64_t length, int64_t most) {
  return most == 0 ? 0 : ceil_div(length, ceil_div(length, most));
}

// The tile that wastes least of its 256 pixels and of the reading around them. Each size that an even cut gives is tried once: at
// most 256 / width heights for each of at most 256 widths, however large the image.
inline GatherPlan plan_gather(int64_t batch, const GatherAxis& rows, const GatherAxis& columns, int64_t channels,
                              int64_t element_bytes) {
  GatherPlan best{};
  best.direct = true;
  int64_t least = 0;
  const int64_t room = kPatchBytes / element_bytes;
  for (int64_t width = even_piece(columns.outputs, kGatherTile); width > 0;
       width = even_piece(columns.outputs, width - 1)) {
    for (int64_t height = even_piece(rows.outputs, kGatherTile / width); height > 0;
         height = even_piece(rows.outputs, height - 1)) {
      GatherPlan plan{};
      plan.patch_height = (height - 1) * rows.step + rows.span;
      plan.patch_width = (width - 1) * columns.step + columns.span;
      const int64_t area = plan.patch_height * plan.patch_width;
      if (area > room - 1 || area * channels > INT32_MAX / 2) continue;
      int64_t samples = kGatherTile / (width * height);
      if (samples > batch) samples = batch;
      if (samples > (room - 1) / area) samples = (room - 1) / area;
      // Odd, so that neighbouring channels start in different banks.
      plan.patch = samples * area | 1;
      if (plan.patch * channels > INT32_MAX) continue;
      plan.tile_samples = samples;
      plan.tile_height = height;
      plan.tile_width = width;
      plan.tiles_n = ceil_div(batch, samples);
      plan.tiles_h = ceil_div(rows.outputs, height);
      plan.tiles_w = ceil_div(columns.outputs, width);
      plan.block_channels = room / plan.patch < channels ? room / plan.patch : channels;
      const int64_t cost = plan.tiles() * (2 * kGatherTile + plan.patch);
      if (best.direct || cost < least) {
        best = plan;
        least = cost;
      }
    }
  }
  return best;
}

}  // namespace swat::cuda
