// Between a dense tensor and its packed form.

// Bits of a word up to which its kept elements are copied one by one.
inline constexpr int kFewBits = 20;

// Compress `count` contiguous elements: values to `out`, bits to `writer`. Returns the kept elements; `out` needs kLanes<T> spare.
template <typename T>
inline int64_t compress_run(const T* data, int64_t count, T threshold, T* out, BitWriter& writer) {
  constexpr int kN = kLanes<T>;
  T* const begin = out;
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t word = 0;
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += kN) {
      word |= static_cast<uint64_t>(kept_bits<T>(load_unaligned(data + i + j), threshold)) << j;
    }
    writer.push_word(word, 64);
    if (__builtin_popcountll(word) <= kFewBits) {
      for (; word != 0; word &= word - 1) *out++ = data[i + __builtin_ctzll(word)];
    } else {
      for (int j = 0; j < 64; j += kN) {
        const uint32_t bits = word >> j & ((uint64_t{1} << kN) - 1);
        store_kept<T>(out, load_unaligned(data + i + j), bits);
        out += __builtin_popcount(bits);
      }
    }
  }
  for (; i + kN <= count; i += kN) {
    const Vec<T> v = load_unaligned(data + i);
    const uint32_t bits = kept_bits<T>(v, threshold);
    writer.push(bits, kN);
    store_kept<T>(out, v, bits);
    out += __builtin_popcount(bits);
  }
  if (i < count) {
    Vec<T> v = {};  // zeros are never kept
    for (int j = 0; j < count - i; ++j) v[j] = data[i + j];
    const uint32_t bits = kept_bits<T>(v, threshold);
    writer.push(bits, static_cast<int>(count - i));
    store_kept<T>(out, v, bits);
    out += __builtin_popcount(bits);
  }
  return out - begin;
}

// Most channels that are compressed together.
inline constexpr int64_t kMostTogether = 1024;

// Channels whose bits are transposed together: whole bytes.
template <typename T>
inline constexpr int kBitChannels = std::max(kLanes<T>, 8);

// Bytes by which reading runs ahead: the hardware's own prefetching ends with each page.
inline constexpr int64_t kFindAhead = 2048;

// words[channel] of at most 64 channels-last pixels: reads memory once, in order, and transposes bits in place of elements.
// `channels` is a multiple of kBitChannels.
template <typename T>
inline void find_kept(const T* data, int64_t channels, int64_t pixels, int64_t pixel_stride, T threshold,
                      uint64_t* words) {
  constexpr int kN = kLanes<T>, kC = kBitChannels<T>;
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(words);
  uint64_t squares[kMostTogether / 8];  // 8 pixels x 8 channels each
  uint8_t* const pixel_bits = reinterpret_cast<uint8_t*>(squares);
  std::fill_n(words, channels, uint64_t{0});
  for (int64_t p = 0; p < pixels; p += 8) {
    const int64_t count = std::min<int64_t>(8, pixels - p);
    if (count < 8) std::fill_n(squares, channels / 8, uint64_t{0});
    for (int64_t i = 0; i < count; ++i) {
      const T* from = data + (p + i) * pixel_stride;
      const T* ahead = from + kFindAhead / sizeof(T);
      for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch(ahead + c);
      for (int64_t c = 0; c < channels; c += kC) {
        uint32_t bits = 0;
        for (int k = 0; k < kC; k += kN) bits |= kept_bits<T>(load_unaligned(from + c + k), threshold) << k;
        for (int k = 0; k < kC; k += 8) pixel_bits[c + k + i] = static_cast<uint8_t>(bits >> k);
      }
    }
    for (int64_t c = 0; c < channels; c += 8) {
      const uint64_t rows = transpose_bits(squares[c / 8]);
      for (int k = 0; k < 8; ++k) bytes[(c + k) * 8 + p / 8] = static_cast<uint8_t>(rows >> 8 * k);
    }
  }
}

// Compress `channels` channels-last planes, 64 pixels of all of them after another, so that memory is read once and in order. Each
// channel's elements go to a place of their own in `out` and are moved together in the end. `words` has channels * (pixels / 64,
// rounded up) words of scratch. Returns the kept elements.
template <typename T>
inline int64_t compress_pixels(const T* data, int64_t channels, int64_t pixels, int64_t pixel_stride, T threshold,
                               uint64_t* words, T* out, BitWriter& writer) {
  uint64_t found[kMostTogether];
  int64_t kept[kMostTogether] = {};
  const int64_t row = (pixels + 63) / 64;
  for (int64_t p = 0; p < pixels; p += 64) {
    const T* const block = data + p * pixel_stride;
    find_kept(block, channels, std::min<int64_t>(64, pixels - p), pixel_stride, threshold, found);
    for (int64_t c = 0; c < channels; ++c) {
      T* to = out + c * (pixels + kPlaneSpare) + kept[c];
      uint64_t word = found[c];
      words[c * row + p / 64] = word;
      kept[c] += __builtin_popcountll(word);
      for (; word != 0; word &= word - 1) *to++ = block[__builtin_ctzll(word) * pixel_stride + c];
    }
  }
  T* end = out;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; p += 64) {
      writer.push_word(*words++, static_cast<int>(std::min<int64_t>(64, pixels - p)));
    }
    end = std::copy_n(out + c * (pixels + kPlaneSpare), kept[c], end);
  }
  return end - out;
}

// kLanes channels out of channels-last pixels, as they lie in logical order: scratch[channel][pixel], and a vector to spare.
template <typename T>
inline void gather_channels(const T* data, int64_t pixels, int64_t pixel_stride, T* scratch) {
  constexpr int kN = kLanes<T>;
  constexpr int kFew = 2;  // 3 x 3 taps are a vector and one: not worth a transpose
  const int64_t whole = pixels / kN * kN;
  if (pixels - whole > kFew) {
    // A transpose writes whole vectors: first this one, whose surplus is where the next channel begins.
    transpose<T>([&](int k) { return data + std::min(whole + k, pixels - 1) * pixel_stride; },
                 [&](int k) { return scratch + k * pixels + whole; });
  } else {
    for (int64_t p = whole; p < pixels; ++p) {
      for (int k = 0; k < kN; ++k) scratch[k * pixels + p] = data[p * pixel_stride + k];
    }
  }
  for (int64_t p = 0; p < whole; p += kN) {
    transpose<T>([&](int k) { return data + (p + k) * pixel_stride; }, [&](int k) { return scratch + k * pixels + p; });
  }
}

// Pixels from which a plane's bits are worth finding before its elements are moved.
inline constexpr int64_t kLongPlane = 64;

// Elements of scratch that compress_planes needs.
template <typename T>
int64_t compress_scratch(const PlanesView<const T>& view) {
  if (view.pixel_stride == 1 || view.pixels == 0) return 0;
  if (view.pixels < kLongPlane) return kLanes<T> * (view.pixels + 1);
  const int64_t words = std::min(view.channels, kMostTogether) * ((view.pixels + 63) / 64);
  return std::max<int64_t>(words * 8 / sizeof(T), kLanes<T> * (view.pixels + 1));
}

// Compress planes [begin, end), in order. Returns the kept elements; `out` needs room for all elements, kPlaneSpare more a plane, and a
// vector. `words` is zeroed beforehand.
template <typename T>
int64_t compress_planes(const PlanesView<const T>& view, T threshold, int64_t begin, int64_t end, uint64_t* words,
                        T* scratch, T* out) {
  constexpr int kN = kLanes<T>;
  BitWriter writer(words, begin * view.pixels);
  T* const first = out;
  auto transposed = [&](const T* data, int64_t pixels) {
    gather_channels(data, pixels, view.pixel_stride, scratch);
    return compress_run(scratch, kN * pixels, threshold, out, writer);
  };
  for (int64_t plane = begin; plane < end;) {
    const int64_t channel = plane % view.channels;
    const T* data = view.data + plane / view.channels * view.outer_stride + channel * view.channel_stride;
    const int64_t pixels = std::min(view.pixels, view.numel - plane * view.pixels);
    const int64_t adjacent = std::min(view.channels - channel, end - plane);
    if (view.pixel_stride == 1) {
      out += compress_run(data, pixels, threshold, out, writer);
      ++plane;
    } else if (view.channel_stride == 1 && pixels >= kLongPlane && adjacent >= kBitChannels<T>) {
      const int64_t together = std::min(adjacent, kMostTogether) / kBitChannels<T> * kBitChannels<T>;
      out += compress_pixels(data, together, pixels, view.pixel_stride, threshold, reinterpret_cast<uint64_t*>(scratch),
                             out, writer);
      plane += together;
    } else if (view.channel_stride == 1 && adjacent >= kN) {
      out += transposed(data, pixels);
      plane += kN;
    } else {
      for (int64_t i = 0; i < pixels; ++i) scratch[i] = data[i * view.pixel_stride];
      out += compress_run(scratch, pixels, threshold, out, writer);
      ++plane;
    }
  }
  return out - first;
}

// counts[i] = set bits of block i, for blocks [begin, end).
inline void count_blocks(const uint64_t* words, int64_t numel, int64_t begin, int64_t end, int64_t* counts) {
  for (int64_t i = begin; i < end; ++i) {
    counts[i] = count_bits(words, i * kBlockBits, std::min(numel, (i + 1) * kBlockBits));
  }
}

// Whether the ranks of blocks [begin, end) and of the block after them are what the bits before them count.
inline bool ranks_agree(const uint64_t* words, const int64_t* ranks, int64_t numel, int64_t begin, int64_t end) {
  const int64_t blocks = ceil_div(numel, kBlockBits);
  bool agree = begin > 0 || ranks[0] == 0;
  for (int64_t i = begin; i < std::min(end, blocks - 1); ++i) {
    int64_t count = 0;
    for (int64_t k = 0; k < kBlockBits / 64; ++k) count += __builtin_popcountll(words[i * (kBlockBits / 64) + k]);
    agree &= ranks[i + 1] - ranks[i] == count;
  }
  return agree;
}

// Write planes [begin, end) from the packed form, dropped elements zero.
template <typename T>
void decompress_planes(const PackedView<T>& packed, const PlanesView<T>& view, int64_t begin, int64_t end) {
  const T* value = packed.values + rank(packed, view.first + begin * view.pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    T* out = view.data + plane / view.channels * view.outer_stride + plane % view.channels * view.channel_stride;
    const int64_t pixels = std::min(view.pixels, view.numel - plane * view.pixels);
    for (int64_t i = 0; i < pixels; ++i) out[i * view.pixel_stride] = 0;
    const int64_t position = view.first + plane * view.pixels;
    for_each_bit(packed.words, position, position + pixels, [&](int64_t i) { out[i * view.pixel_stride] = *value++; });
  }
}

// Write to `values` the elements of planes [begin, end) whose bits are set: what compress would keep by those bits.
template <typename T>
void take_planes(const PackedView<T>& packed, const PlanesView<const T>& view, int64_t begin, int64_t end, T* values) {
  T* value = values + rank(packed, begin * view.pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* from = view.data + plane / view.channels * view.outer_stride + plane % view.channels * view.channel_stride;
    const int64_t pixels = std::min(view.pixels, view.numel - plane * view.pixels);
    for_each_bit(packed.words, plane * view.pixels, plane * view.pixels + pixels,
                 [&](int64_t i) { *value++ = from[i * view.pixel_stride]; });
  }
}

// The same for samples [begin, end), each all channels of one index of the first dimension: for planes of a few pixels, whose bits
// are fewer than a word. `offsets` says where the elements of a sample lie.
template <typename T>
void take_samples(const PackedView<T>& packed, const PlanesView<const T>& view, const int32_t* offsets, int64_t begin,
                  int64_t end, T* values) {
  const int64_t elements = view.channels * view.pixels;
  T* value = values + rank(packed, begin * elements);
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* from = view.data + sample * view.outer_stride;
    for_each_bit(packed.words, sample * elements, (sample + 1) * elements,
                 [&](int64_t i) { *value++ = from[offsets[i]]; });
  }
}
