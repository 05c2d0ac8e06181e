// Convolution with sparse weights, as a gather: forward, and the input gradient on the transposed pattern.
//
// For one vector of tiles: pack a block of channels as [channel][pixel][lane], so that every tap of every weight is an aligned load
// from L1; walk the non-zero weights of each output row with the row's pixels in registers; at the end transpose the rows out.

// One output row over one block: y[kH][kW][lane] (+)= sum of weight * x.
template <typename T, int kH, int kW>
inline void gather_row(const T* x, const GatherEntry<T>* entry, const GatherEntry<T>* end, int64_t pitch_bytes, T* y,
                       bool first, T bias) {
  constexpr int kN = kLanes<T>;
  Vec<T> sum[kH * kW];
  if (first) {
#pragma GCC unroll 32
    for (int i = 0; i < kH * kW; ++i) sum[i] = broadcast<T>(bias);
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < kH * kW; ++i) sum[i] = load(y + i * kN);
  }
  for (; entry < end; ++entry) {
    const Vec<T> w = broadcast<T>(entry->weight);
    const char* row = reinterpret_cast<const char*>(x) + entry->offset;
#pragma GCC unroll 8
    for (int i = 0; i < kH; ++i) {
      const T* pixel = reinterpret_cast<const T*>(row + i * pitch_bytes);
#pragma GCC unroll 32
      for (int j = 0; j < kW; ++j) sum[i * kW + j] += w * load(pixel + j * kN);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kH * kW; ++i) store(y + i * kN, sum[i]);
}

// The same where the entries are runs: a pixel is loaded once for all the weights of a run that it meets.
template <typename T, int kH, int kW>
inline void gather_runs(const T* x, const GatherEntry<T>* entry, const GatherEntry<T>* end, int run,
                        int64_t pitch_bytes, T* y, bool first, T bias) {
  constexpr int kN = kLanes<T>;
  const int leftmost = run > 0 ? 0 : kRunWeights - 1;
  Vec<T> sum[kH * kW];
  if (first) {
#pragma GCC unroll 32
    for (int i = 0; i < kH * kW; ++i) sum[i] = broadcast<T>(bias);
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < kH * kW; ++i) sum[i] = load(y + i * kN);
  }
  for (; entry < end; entry += kRunWeights) {
    Vec<T> w[kRunWeights];
#pragma GCC unroll 8
    for (int k = 0; k < kRunWeights; ++k) w[k] = broadcast<T>(entry[leftmost + k * run].weight);
    const char* row = reinterpret_cast<const char*>(x) + entry[leftmost].offset;
#pragma GCC unroll 8
    for (int i = 0; i < kH; ++i) {
      const T* pixel = reinterpret_cast<const T*>(row + i * pitch_bytes);
#pragma GCC unroll 32
      for (int j = 0; j < kW + kRunWeights - 1; ++j) {
        const Vec<T> v = load(pixel + j * kN);
#pragma GCC unroll 8
        for (int k = 0; k < kRunWeights; ++k) {
          if (0 <= j - k && j - k < kW) sum[i * kW + j - k] += w[k] * v;
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kH * kW; ++i) store(y + i * kN, sum[i]);
}

// Whether each of the lists [begin, end) is runs whose pixels are `step` bytes apart.
template <typename T>
bool are_runs(const GatherEntry<T>* entries, const int64_t* starts, int64_t begin, int64_t end, int64_t step) {
  for (int64_t list = begin; list < end; ++list) {
    if ((starts[list + 1] - starts[list]) % kRunWeights != 0) return false;
    for (int64_t i = starts[list]; i < starts[list + 1]; i += kRunWeights) {
      for (int64_t k = 1; k < kRunWeights; ++k) {
        if (entries[i + k].offset - entries[i + k - 1].offset != step) return false;
      }
    }
  }
  return true;
}

// The tiles in the lanes of one vector.
template <typename T>
struct GatherLanes {
  const T* input[kLanes<T>];  // pixel (0, 0) of the tile in its sample; may lie outside it
  T* output[kLanes<T>];
  int64_t in_row[kLanes<T>], in_column[kLanes<T>];
  int64_t out_rows[kLanes<T>], out_columns[kLanes<T>];  // output pixels of the tile that exist
  bool interior;                                        // every lane is in use and every packed pixel exists
  bool aligned;  // every lane is in use and shows the same tile of another sample
  bool whole;    // every lane is in use and every output pixel exists
};

// The vector of tiles to compute as number `index`: where a vector is one tile of kLanes samples, all tiles of those samples one after
// the other, so that neighbours find in cache the pixels that they share.
template <typename T>
int64_t tile_of_task(const GatherParams<T>& p, int64_t index) {
  if (p.input.batch % kLanes<T> != 0) return index;
  const int64_t tiles = p.tiles_h() * p.tiles_w();
  return index % tiles * (p.input.batch / kLanes<T>)+index / tiles;
}

template <typename T>
GatherLanes<T> gather_lanes(const GatherParams<T>& p, int64_t tile) {
  constexpr int kN = kLanes<T>;
  const auto& in = p.input;
  const auto& out = p.output;
  const int64_t tiles_w = p.tiles_w(), instances = p.tiles_h() * tiles_w * in.batch;
  const auto [row_min, row_max] = std::minmax_element(p.tile_rows, p.tile_rows + p.packed_height);
  const auto [column_min, column_max] = std::minmax_element(p.tile_columns, p.tile_columns + p.packed_width);
  GatherLanes<T> lanes;
  lanes.interior = lanes.aligned = lanes.whole = (tile + 1) * kN <= instances;
  for (int lane = 0; lane < kN; ++lane) {
    const int64_t instance = tile * kN + lane;
    if (instance >= instances) {
      // An unused lane shows no output pixel, and its input rows lie outside the image.
      lanes.input[lane] = in.data;
      lanes.output[lane] = out.data;
      lanes.in_row[lane] = in.height - *row_min;
      lanes.in_column[lane] = 0;
      lanes.out_rows[lane] = lanes.out_columns[lane] = 0;
      continue;
    }
    const int64_t n = instance % in.batch;
    const int64_t i = instance / in.batch / tiles_w * p.tile_height;
    const int64_t j = instance / in.batch % tiles_w * p.tile_width;
    const int64_t row = i * p.step_h, column = j * p.step_w;
    lanes.in_row[lane] = row;
    lanes.in_column[lane] = column;
    lanes.input[lane] = in.data + n * in.batch_stride + row * in.row_stride + column * in.column_stride;
    lanes.output[lane] = out.data + n * out.batch_stride + i * out.row_stride + j * out.column_stride;
    lanes.out_rows[lane] = std::min(p.tile_height, out.height - i);
    lanes.out_columns[lane] = std::min(p.tile_width, out.width - j);
    lanes.interior &= row + *row_min >= 0 && row + *row_max < in.height && column + *column_min >= 0 &&
                      column + *column_max < in.width;
    lanes.aligned &= row == lanes.in_row[0] && column == lanes.in_column[0];
    lanes.whole &= lanes.out_rows[lane] == p.tile_height && lanes.out_columns[lane] == p.tile_width;
  }
  return lanes;
}

// x[channel][pixel][lane] for the channels of one block; pixels outside the image are zero.
template <typename T>
void gather_pack(const GatherParams<T>& p, const GatherLanes<T>& lanes, const ChannelBlock& block, T* x) {
  constexpr int kN = kLanes<T>;
  alignas(64) static constexpr T kZeros[kMostBlockChannels] = {};
  const auto& in = p.input;
  const int64_t channels = block.channel_end - block.channel_begin;
  const int64_t plane = p.packed_height * p.packed_width * kN;  // one channel of x
  const int64_t transposed = in.channel_stride == 1 ? channels / kN * kN : 0;
  for (int64_t r = 0; r < p.packed_height; ++r) {
    for (int64_t c = 0; c < p.packed_width; ++c) {
      const int64_t row = p.tile_rows[r], column = p.tile_columns[c];
      const int64_t delta = row * in.row_stride + column * in.column_stride + block.channel_begin * in.channel_stride;
      T* out = x + (r * p.packed_width + c) * kN;
      auto exists = [&](int lane) {
        const uint64_t h = lanes.in_row[lane] + row, w = lanes.in_column[lane] + column;
        return h < static_cast<uint64_t>(in.height) && w < static_cast<uint64_t>(in.width);
      };
      if (!lanes.interior && lanes.aligned && !exists(0)) {
        for (int64_t k = 0; k < channels; ++k) store(out + k * plane, Vec<T>{});
        continue;
      }
      const bool all = lanes.interior || lanes.aligned;
      const T* src[kN];
      if (all) {
        for (int lane = 0; lane < kN; ++lane) src[lane] = lanes.input[lane] + delta;
      } else {
        for (int lane = 0; lane < kN; ++lane) src[lane] = exists(lane) ? lanes.input[lane] + delta : kZeros;
      }
      T* channel = out;
      for (int64_t k = 0; k < transposed; k += kN, channel += kN * plane) {
        transpose<T>([&](int lane) { return src[lane] + k; }, [&](int i) { return channel + i * plane; });
      }
      for (int64_t k = transposed; k < channels; ++k) {
        for (int lane = 0; lane < kN; ++lane) {
          out[k * plane + lane] = src[lane] == kZeros ? T{0} : src[lane][k * in.channel_stride];
        }
      }
    }
  }
}

// Write rows [begin, end) of y[row][pixel][lane] to the output; what falls outside it goes to unused[end - begin].
template <typename T>
void gather_store(const GatherParams<T>& p, const GatherLanes<T>& lanes, int64_t begin, int64_t end, const T* y,
                  T* unused) {
  constexpr int kN = kLanes<T>;
  const auto& out = p.output;
  const int64_t plane = p.tile_height * p.tile_width * kN;
  const int64_t transposed = out.channel_stride == 1 ? (end - begin) / kN * kN : 0;
  for (int64_t i = 0; i < p.tile_height; ++i) {
    for (int64_t j = 0; j < p.tile_width; ++j) {
      const T* pixel = y + (i * p.tile_width + j) * kN;
      const int64_t delta = begin * out.channel_stride + i * out.row_stride + j * out.column_stride;
      T* dst[kN];
      for (int lane = 0; lane < kN; ++lane) {
        const bool exists = lanes.whole || (i < lanes.out_rows[lane] && j < lanes.out_columns[lane]);
        dst[lane] = exists ? lanes.output[lane] + delta : nullptr;
      }
      if (transposed > 0) {
        T* row[kN];
        for (int lane = 0; lane < kN; ++lane) row[lane] = dst[lane] ? dst[lane] : unused;
        const T* from = pixel;
        for (int64_t k = 0; k < transposed; k += kN, from += kN * plane) {
          transpose<T>([&](int r) { return from + r * plane; }, [&](int lane) { return row[lane] + k; });
        }
      }
      for (int64_t k = transposed; k < end - begin; ++k) {
        for (int lane = 0; lane < kN; ++lane) {
          if (dst[lane]) dst[lane][k * out.channel_stride] = pixel[k * plane + lane];
        }
      }
    }
  }
}

template <typename T, int kH, int kW>
void gather_tiles_as(const GatherParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  constexpr int kN = kLanes<T>;
  const int64_t rows = p.output.channels, chunks = p.row_chunks();
  const int64_t y_plane = p.tile_height * p.tile_width * kN;
  const int64_t pitch_bytes = p.packed_width * kN * static_cast<int64_t>(sizeof(T));
  T* x = scratch;
  T* y = x + p.block_channels * p.packed_height * p.packed_width * kN;
  T* unused = y + p.row_chunk * y_plane;
  for (int64_t task = begin; task < end; ++task) {
    const GatherLanes<T> lanes = gather_lanes(p, tile_of_task(p, task / chunks));
    const int64_t row_begin = task % chunks * p.row_chunk, row_end = std::min(rows, row_begin + p.row_chunk);
    for (int64_t b = 0; b < p.block_count; ++b) {
      const ChannelBlock& block = p.blocks[b];
      const int64_t from = std::max(row_begin, block.row_begin), to = std::min(row_end, block.row_end);
      if (from >= to) continue;
      const int64_t lists = block.list - block.row_begin;
      if (p.starts[lists + from] != p.starts[lists + to]) gather_pack(p, lanes, block, x);
      for (int64_t row = from; row < to; ++row) {
        const GatherEntry<T>* first = p.entries + p.starts[lists + row];
        const GatherEntry<T>* last = p.entries + p.starts[lists + row + 1];
        if (first == last && !block.first) continue;
        const T bias = p.bias ? p.bias[row] : T{0};
        T* sums = y + (row - row_begin) * y_plane;
        // The tile is kW pixels wide and a multiple of kH high.
        for (int64_t i = 0; i < p.tile_height; i += kH) {
          const T* const tile = x + i * p.packed_width * kN;
          if (p.run == 0) {
            gather_row<T, kH, kW>(tile, first, last, pitch_bytes, sums + i * kW * kN, block.first, bias);
          } else {
            gather_runs<T, kH, kW>(tile, first, last, p.run, pitch_bytes, sums + i * kW * kN, block.first, bias);
          }
        }
      }
    }
    gather_store(p, lanes, row_begin, row_end, y, unused);
  }
}

#if SWAT_VECTOR_BYTES == 64
inline constexpr RegisterTile kRegisterTiles[] = {{4, 4}, {2, 8}, {1, 16}, {4, 7}, {2, 4}, {1, 8}};
#elif SWAT_REGISTERS == 32
inline constexpr RegisterTile kRegisterTiles[] = {{4, 4}, {4, 6}, {2, 8}, {1, 16}, {4, 7}, {3, 8}};
#else
inline constexpr RegisterTile kRegisterTiles[] = {{2, 4}, {1, 8}, {3, 4}, {1, 7}, {1, 4}, {2, 6}};
#endif

// Elements of scratch, 64-byte aligned, that gather_tiles needs.
template <typename T>
int64_t gather_scratch(const GatherParams<T>& p) {
  return (p.block_channels * p.packed_height * p.packed_width + p.row_chunk * p.tile_height * p.tile_width) *
             kLanes<T> +
         p.row_chunk;
}

// Tasks: vectors of tiles times chunks of rows.
template <typename T>
int64_t gather_tasks(const GatherParams<T>& p) {
  return ceil_div(p.tiles_h() * p.tiles_w() * p.input.batch, kLanes<T>) * p.row_chunks();
}

template <typename T>
void gather_tiles(const GatherParams<T>& p, int64_t begin, int64_t end, T* scratch) {
  [&]<std::size_t... kI>(std::index_sequence<kI...>) {
    ((p.shape == kI ? gather_tiles_as<T, kRegisterTiles[kI].height, kRegisterTiles[kI].width>(p, begin, end, scratch)
                    : void()),
     ...);
  }(std::make_index_sequence<std::size(kRegisterTiles)>{});
}
