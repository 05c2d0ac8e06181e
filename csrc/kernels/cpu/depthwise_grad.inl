// Weight gradient of convolutions whose groups have few output channels, depthwise ones above all.
//
// Lanes are output channels of any groups. For a tile of output pixels the kept activations that it reads are put back as
// [pixel][lane], zeros between them, and up to 3 x 3 taps are summed in registers over all pixels of the tile: one multiplication
// serves a vector of groups, where a list of activations (weight_grad.inl) would serve one group with mostly empty lanes.

// Output pixels of one tile, the input pixel at its corner (it may lie outside the image), and dy of one block of channels.
template <typename T>
struct DepthwiseTile {
  int64_t sample, rows, columns;
  int64_t out_row, out_column, in_row, in_column;
  const T* grad;
  int64_t grad_row_step, grad_column_step;
};

template <typename T>
inline DepthwiseTile<T> depthwise_tile(const DepthwiseParams<T>& p, int64_t index) {
  const ConvGeometry& g = p.geometry;
  DepthwiseTile<T> tile{};
  tile.sample = index / (p.tiles_h * p.tiles_w);
  tile.out_row = index / p.tiles_w % p.tiles_h * p.tile_rows;
  tile.out_column = index % p.tiles_w * p.tile_columns;
  tile.rows = std::min(p.tile_rows, g.out_height - tile.out_row);
  tile.columns = std::min(p.tile_columns, g.out_width - tile.out_column);
  tile.in_row = tile.out_row * g.stride_height - g.pad_top;
  tile.in_column = tile.out_column * g.stride_width - g.pad_left;
  return tile;
}

// Let the tile find dy of `channels` output channels from `channel`: where it lies, or packed as [pixel][lane] in `scratch`.
template <typename T>
void find_grad(const DepthwiseParams<T>& p, int64_t channel, int64_t channels, T* scratch, DepthwiseTile<T>& tile) {
  constexpr int kN = kLanes<T>;
  const auto& dy = p.grad_output;
  const T* const data = dy.data + tile.sample * dy.batch_stride + channel * dy.channel_stride +
                        tile.out_row * dy.row_stride + tile.out_column * dy.column_stride;
  if (dy.channel_stride == 1 && channels == kN) {
    tile.grad = data;
    tile.grad_row_step = dy.row_stride;
    tile.grad_column_step = dy.column_stride;
    return;
  }
  tile.grad = scratch;
  tile.grad_row_step = tile.columns * kN;
  tile.grad_column_step = kN;
  const bool joined = tile.columns == dy.width && rows_join(dy);
  const int64_t runs = joined ? 1 : tile.rows, pixels = joined ? tile.rows * tile.columns : tile.columns;
  for (int64_t r = 0; r < runs; ++r) {
    pack_pixels(dy, 1, data + r * dy.row_stride, pixels, channels, scratch + r * pixels * kN);
  }
}

// The kept activations of one channel, in `copies` neighbouring lanes of the patch.
template <typename T>
inline void place_channel(const DepthwiseParams<T>& p, const DepthwiseTile<T>& tile, int64_t channel, int64_t copies,
                          PackedCursor<T>& at, T* patch) {
  constexpr int kN = kLanes<T>;
  const ConvGeometry& g = p.geometry;
  const int64_t row_begin = std::max<int64_t>(tile.in_row, 0);
  const int64_t row_end = std::min(tile.in_row + p.patch_rows, g.in_height);
  const int64_t column_begin = std::max<int64_t>(tile.in_column, 0);
  const int64_t column_end = std::min(tile.in_column + p.patch_columns, g.in_width);
  if (row_begin >= row_end || column_begin >= column_end) return;
  const int64_t columns = column_end - column_begin;
  const bool joined = columns == g.in_width;
  const int64_t runs = joined ? 1 : row_end - row_begin, bits = joined ? (row_end - row_begin) * columns : columns;
  int64_t begin = ((tile.sample * g.in_channels + channel) * g.in_height + row_begin) * g.in_width + column_begin;
  T* out = patch + ((row_begin - tile.in_row) * p.patch_columns + column_begin - tile.in_column) * kN;
  for (int64_t r = 0; r < runs; ++r, begin += g.in_width, out += p.patch_columns * kN) {
    seek(p.input, at, begin);
    const T* value = at.value;
    if (copies == 1) {
      for_each_bit(p.input.words, begin, begin + bits, [&](int64_t i) { out[p.pixel[i]] = *value++; });
    } else {
      for_each_bit(p.input.words, begin, begin + bits, [&](int64_t i) {
        T* const to = out + p.pixel[i];
        for (int64_t k = 0; k < copies; ++k) to[k] = *value;
        ++value;
      });
    }
    at = {begin + bits, value};
  }
}

// x[pixel][lane] of the tile: input channel `within` of the group of each of `channels` output channels from `channel`.
template <typename T>
void place_patch(const DepthwiseParams<T>& p, const DepthwiseTile<T>& tile, int64_t channel, int64_t channels,
                 int64_t within, PackedCursor<T>& at, T* patch) {
  constexpr int kN = kLanes<T>;
  const ConvGeometry& g = p.geometry;
  std::fill_n(patch, p.patch_rows * p.patch_columns * kN, T{0});
  for (int64_t lane = 0; lane < channels;) {
    const int64_t group = (channel + lane) / g.group_out();
    const int64_t copies = std::min((group + 1) * g.group_out() - channel, channels) - lane;
    place_channel(p, tile, group * g.group_in() + within, copies, at, patch + lane);
    lane += copies;
  }
}

// out[tap][lane] += sum over the tile's pixels of x * dy, for kRows x kColumns taps from (row, column).
template <typename T, int kRows, int kColumns>
void accumulate_patch(const DepthwiseParams<T>& p, const DepthwiseTile<T>& tile, int64_t row, int64_t column,
                      const T* patch, T* out) {
  constexpr int kN = kLanes<T>;
  const ConvGeometry& g = p.geometry;
  const int64_t pitch = p.patch_columns * kN, tap_row = g.dilation_height * pitch, tap_column = g.dilation_width * kN;
  const T* const corner = patch + row * tap_row + column * tap_column;
  Vec<T> sum[kRows * kColumns] = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* x = corner + r * g.stride_height * pitch;
    const T* dy = tile.grad + r * tile.grad_row_step;
    for (int64_t c = 0; c < tile.columns; ++c, x += g.stride_width * kN, dy += tile.grad_column_step) {
      const Vec<T> grad = load_unaligned(dy);
#pragma GCC unroll 3
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < kColumns; ++j) sum[i * kColumns + j] += grad * load(x + i * tap_row + j * tap_column);
      }
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kColumns; ++j) {
      T* const to = out + ((row + i) * g.kernel_width + column + j) * kN;
      store(to, load(to) + sum[i * kColumns + j]);
    }
  }
}

// All taps, in runs of up to 3 x 3.
template <typename T>
void accumulate_patches(const DepthwiseParams<T>& p, const DepthwiseTile<T>& tile, const T* patch, T* out) {
  const ConvGeometry& g = p.geometry;
  for (int64_t row = 0; row < g.kernel_height; row += 3) {
    for (int64_t column = 0; column < g.kernel_width; column += 3) {
      const int64_t rows = std::min<int64_t>(3, g.kernel_height - row);
      const int64_t columns = std::min<int64_t>(3, g.kernel_width - column);
      [&]<int... kI>(std::integer_sequence<int, kI...>) {
        ((rows == kI / 3 + 1 && columns == kI % 3 + 1
              ? accumulate_patch<T, kI / 3 + 1, kI % 3 + 1>(p, tile, row, column, patch, out)
              : void()),
         ...);
      }(std::make_integer_sequence<int, 9>{});
    }
  }
}

// Elements of scratch, aligned to a vector, that depthwise_slice needs.
template <typename T>
int64_t depthwise_scratch(const DepthwiseParams<T>& p) {
  return (p.patch_rows * p.patch_columns + p.tile_rows * p.tile_columns) * kLanes<T>;
}

// Sum one slice of the tiles into `partial`, which is zero, for blocks [begin, end) of kLanes output channels.
template <typename T>
void depthwise_slice(const DepthwiseParams<T>& p, int64_t slice, int64_t begin, int64_t end, T* scratch) {
  constexpr int kN = kLanes<T>;
  const ConvGeometry& g = p.geometry;
  T* const patch = scratch;
  T* const grad = scratch + p.patch_rows * p.patch_columns * kN;
  const int64_t block_sums = g.group_in() * g.taps() * kN;
  T* const sums = p.partial + slice * ceil_div(g.out_channels, kN) * block_sums;
  PackedCursor<T> at;
  for (int64_t index = p.tiles() * slice / p.slices; index < p.tiles() * (slice + 1) / p.slices; ++index) {
    DepthwiseTile<T> tile = depthwise_tile(p, index);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t channels = std::min<int64_t>(kN, g.out_channels - block * kN);
      find_grad(p, block * kN, channels, grad, tile);
      for (int64_t within = 0; within < g.group_in(); ++within) {
        place_patch(p, tile, block * kN, channels, within, at, patch);
        accumulate_patches(p, tile, patch, sums + block * block_sums + within * g.taps() * kN);
      }
    }
  }
}

// Add the slices of `partial` and write grad_weight for blocks [begin, end) of kLanes output channels.
template <typename T>
void depthwise_reduce(const DepthwiseParams<T>& p, int64_t begin, int64_t end) {
  constexpr int kN = kLanes<T>;
  const ConvGeometry& g = p.geometry;
  const int64_t taps = g.taps(), block_sums = g.group_in() * taps * kN;
  const int64_t slice_sums = ceil_div(g.out_channels, kN) * block_sums;
  const int64_t channel_step = p.channels_last ? 1 : taps, tap_step = p.channels_last ? g.group_in() : 1;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t channels = std::min<int64_t>(kN, g.out_channels - block * kN);
    for (int64_t within = 0; within < g.group_in(); ++within) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* const from = p.partial + block * block_sums + (within * taps + tap) * kN;
        Vec<T> sum = load(from);
        for (int64_t s = 1; s < p.slices; ++s) sum += load(from + s * slice_sums);
        T* const to = p.grad_weight + block * kN * g.group_in() * taps + within * channel_step + tap * tap_step;
        for (int64_t lane = 0; lane < channels; ++lane) to[lane * g.group_in() * taps] = sum[lane];
      }
    }
  }
}
