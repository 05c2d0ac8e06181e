// Planning of the weight gradient (weight_grad.inl): which taps an activation meets, how the image is cut in tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace swat::cpu {

// The size of even pieces of `whole`: as few as `most` allows, as equal as can be.
int64_t even_cut(int64_t whole, int64_t most);

// Parts of `tiles` whose sums, of so many elements each, are kept apart, so that threads can share a small dW: as many whatever
// the number of threads.
int64_t fitting_slices(int64_t tiles, int64_t elements);

struct WeightGradPlan {
  int64_t vectors = 1;
  int64_t tile_samples = 1, tile_rows = 1, tile_columns = 1;
  int64_t tiles_n = 0, tiles_h = 0, tiles_w = 0;
  int64_t origin_row = 0, origin_column = 0;
  int64_t grad_rows = 1, grad_columns = 1;
  std::vector<int32_t> pixel;
  std::vector<uint16_t> pixel_class;
  std::vector<TapRun> runs;
  std::vector<TapClass> classes;
  int64_t batch_tiles = 1, listed_tiles = 1;
  int64_t blocks_together = 1;
  bool direct = false;  // one batch holds all tiles: no partial sums
  int64_t slices = 1;
};

// Slices and tiles decide in which order sums are rounded: they depend on the geometry, the vectors' width and the density alone,
// never on threads.
// `lanes` elements make a vector; `most_vectors(taps)` is how many of them a run of that many taps leaves registers for; `density`
// is the kept share of the activations.
WeightGradPlan plan_weight_grad(const ConvGeometry& geometry, int64_t element_bytes, int64_t lanes,
                                int64_t (*most_vectors)(int64_t taps), double density);

}  // namespace swat::cpu
