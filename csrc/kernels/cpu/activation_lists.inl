// From a packed input to the lists that the weight gradient walks: for every channel and every tile of the image, the kept
// activations with the byte offset of their pixel in the tile of dy.

// Input pixels of tile `index` that exist.
struct TileBounds {
  int64_t sample_begin, sample_end, row_begin, row_end, column_begin, column_end;
  int64_t grad_row, grad_column;  // dy pixel at the tile's corner; may lie outside dy
};

template <typename T>
inline TileBounds tile_bounds(const WeightGradParams<T>& p, int64_t index) {
  const ConvGeometry& g = p.geometry;
  const int64_t n = index / (p.tiles_h * p.tiles_w), h = index / p.tiles_w % p.tiles_h, w = index % p.tiles_w;
  TileBounds b;
  b.sample_begin = n * p.tile_samples;
  b.sample_end = std::min(g.batch, b.sample_begin + p.tile_samples);
  b.row_begin = h * p.tile_rows * g.stride_height;
  b.row_end = std::min(g.in_height, b.row_begin + p.tile_rows * g.stride_height);
  b.column_begin = w * p.tile_columns * g.stride_width;
  b.column_end = std::min(g.in_width, b.column_begin + p.tile_columns * g.stride_width);
  b.grad_row = h * p.tile_rows + p.origin_row;
  b.grad_column = w * p.tile_columns + p.origin_column;
  return b;
}

inline constexpr int64_t kAheadBytes = 64;

// Move a cursor to element `target`.
template <typename T>
inline void seek(const PackedView<T>& packed, PackedCursor<T>& at, int64_t target) {
  if (at.value != nullptr && target >= at.position && target - at.position < kBlockBits) {
    at.value += count_bits(packed.words, at.position, target);
  } else {
    at.value = packed.values + rank(packed, target);
  }
  at.position = target;
}

// The kept activations of one channel in one tile, in order, as (value, byte offset in the dy tile); returns the end.
template <typename T>
GatherEntry<T>* list_channel(const WeightGradParams<T>& p, const TileBounds& b, int64_t channel, PackedCursor<T>& at,
                             GatherEntry<T>* out, uint16_t* out_class) {
  using Offset = decltype(GatherEntry<T>::offset);
  const ConvGeometry& g = p.geometry;
  const int64_t pixel_bytes = p.vectors * kVectorBytes;
  const int64_t row_pixels = p.tile_columns * g.stride_width;
  const int64_t columns = b.column_end - b.column_begin;
  // Whole rows of the image that are also whole rows of the table are one run of bits.
  const bool joined = columns == g.in_width && columns == row_pixels;
  const int64_t runs = joined ? 1 : b.row_end - b.row_begin;
  const int64_t run_bits = joined ? (b.row_end - b.row_begin) * columns : columns;
  for (int64_t n = b.sample_begin; n < b.sample_end; ++n) {
    const int64_t plane = (n * g.in_channels + channel) * g.in_height * g.in_width;
    const int64_t sample = (n - b.sample_begin) * p.grad_rows * p.grad_columns;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t begin = plane + (b.row_begin + r) * g.in_width + b.column_begin;
      seek(p.input, at, begin);
      const T* value = at.value;
      const int32_t* pixel = p.pixel + r * row_pixels;
      if (p.class_count == 1) {
        for_each_bit(p.input.words, begin, begin + run_bits,
                     [&](int64_t i) { *out++ = {*value++, static_cast<Offset>((sample + pixel[i]) * pixel_bytes)}; });
      } else {
        const uint16_t* pixel_class = p.pixel_class + r * row_pixels;
        for_each_bit(p.input.words, begin, begin + run_bits, [&](int64_t i) {
          *out++ = {*value++, static_cast<Offset>((sample + pixel[i]) * pixel_bytes)};
          *out_class++ = pixel_class[i];
        });
      }
      at = {begin + run_bits, value};
      // Where the channel's next tile goes on; no hardware prefetcher follows as many streams as there are channels.
      __builtin_prefetch(value + kAheadBytes / sizeof(T));
      __builtin_prefetch(p.input.words + at.position / 64 + 1);
    }
  }
  return out;
}

// The same for a tile of whole images, where every activation meets the same taps: all channels of a sample in the order of memory.
// Planes are short then, and to look each of them up would cost more than to list it. `next` has a place for each channel.
template <typename T>
GatherEntry<T>* list_images(const WeightGradParams<T>& p, const TileBounds& b, int64_t channel_begin,
                            int64_t channel_end, GatherEntry<T>* const entries, GatherEntry<T>* out, int64_t* start,
                            int64_t* next) {
  using Offset = decltype(GatherEntry<T>::offset);
  const int64_t plane = p.geometry.in_height * p.geometry.in_width, channels = channel_end - channel_begin;
  const int64_t pixel_bytes = p.vectors * kVectorBytes;
  auto first_bit = [&](int64_t n) { return (n * p.geometry.in_channels + channel_begin) * plane; };
  std::fill_n(next, channels, int64_t{0});
  for (int64_t n = b.sample_begin; n < b.sample_end; ++n) {
    int64_t bit = first_bit(n);
    for (int64_t c = 0; c < channels; ++c, bit += plane) next[c] += count_bits(p.input.words, bit, bit + plane);
  }
  int64_t position = out - entries;
  for (int64_t c = 0; c < channels; ++c) {
    start[c] = position;
    position += std::exchange(next[c], position);
  }
  for (int64_t n = b.sample_begin; n < b.sample_end; ++n) {
    int64_t bit = first_bit(n);
    const T* value = p.input.values + rank(p.input, bit);
    const int64_t sample = (n - b.sample_begin) * p.grad_rows * p.grad_columns;
    for (int64_t c = 0; c < channels; ++c, bit += plane) {
      GatherEntry<T>* to = entries + next[c];
      for_each_bit(p.input.words, bit, bit + plane,
                   [&](int64_t i) { *to++ = {*value++, static_cast<Offset>((sample + p.pixel[i]) * pixel_bytes)}; });
      next[c] = to - entries;
    }
  }
  return entries + position;
}

// Lists of channels [channel_begin, channel_end) for tiles [begin, end): starts[tile][channel][class].
template <typename T>
void list_tiles(const WeightGradParams<T>& p, int64_t begin, int64_t end, int64_t channel_begin, int64_t channel_end,
                WeightGradScratch<T>& scratch) {
  const ConvGeometry& g = p.geometry;
  const int64_t tile_pixels = p.tile_samples * p.tile_rows * g.stride_height * p.tile_columns * g.stride_width;
  int64_t total = 0;
  for (int64_t n = tile_bounds(p, begin).sample_begin; n < tile_bounds(p, end - 1).sample_end; ++n) {
    const int64_t plane = g.in_height * g.in_width;
    total += rank(p.input, (n * g.in_channels + channel_end) * plane) -
             rank(p.input, (n * g.in_channels + channel_begin) * plane);
  }
  scratch.entries.reserve(total);
  scratch.starts.reserve((end - begin) * (channel_end - channel_begin) * p.class_count + 1);
  if (p.class_count > 1) {
    scratch.unsorted.reserve(tile_pixels);
    scratch.classes.reserve(tile_pixels);
    scratch.next.resize(p.class_count);
  }
  GatherEntry<T>* const entries = scratch.entries.data();
  GatherEntry<T>* out = entries;
  int64_t* start = scratch.starts.data();
  if (p.class_count == 1 && p.tiles_h == 1 && p.tiles_w == 1) {
    const int64_t channels = channel_end - channel_begin;
    scratch.next.resize(channels);
    for (int64_t tile = begin; tile < end; ++tile, start += channels) {
      out = list_images(p, tile_bounds(p, tile), channel_begin, channel_end, entries, out, start, scratch.next.data());
    }
    *start = out - entries;
    return;
  }
  // A tile mostly begins in the bitmap where the one before ended.
  scratch.cursors.assign(channel_end - channel_begin, {});
  for (int64_t tile = begin; tile < end; ++tile) {
    const TileBounds bounds = tile_bounds(p, tile);
    for (int64_t channel = channel_begin; channel < channel_end; ++channel) {
      PackedCursor<T>& at = scratch.cursors[channel - channel_begin];
      *start = out - entries;
      if (p.class_count == 1) {
        out = list_channel(p, bounds, channel, at, out, nullptr);
        ++start;
        continue;
      }
      // Counting sort by class.
      GatherEntry<T>* const unsorted = scratch.unsorted.data();
      uint16_t* const classes = scratch.classes.data();
      const int64_t count = list_channel(p, bounds, channel, at, unsorted, classes) - unsorted;
      int64_t* const next = scratch.next.data();
      std::fill_n(next, p.class_count, int64_t{0});
      for (int64_t i = 0; i < count; ++i) ++next[classes[i]];
      int64_t position = out - entries;
      for (int64_t k = 0; k < p.class_count; ++k) {
        *start++ = position;
        position += std::exchange(next[k], position);
      }
      for (int64_t i = 0; i < count; ++i) entries[next[classes[i]]++] = unsorted[i];
      out += count;
    }
  }
  *start = out - entries;
}
