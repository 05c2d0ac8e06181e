// Between a dense tensor and its packed form.

// Compress `count` contiguous elements: values to `out`, bits to `writer`. Returns the kept elements; `out` needs kLanes<T> spare.
template <typename T>
inline int64_t compress_run(const T* data, int64_t count, T threshold, T* out, BitWriter& writer) {
  constexpr int kN = kLanes<T>;
  T* const begin = out;
  int64_t i = 0;
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

// Elements of scratch that compress_planes needs.
template <typename T>
int64_t compress_scratch(const PlanesView<const T>& view) {
  if (view.pixel_stride == 1) return 0;
  return kLanes<T> * (view.pixels + 1);
}

// Compress planes [begin, end), in order. Returns the kept elements; `out` needs a spare vector. `words` is zeroed beforehand.
template <typename T>
int64_t compress_planes(const PlanesView<const T>& view, T threshold, int64_t begin, int64_t end, uint64_t* words,
                        T* scratch, T* out) {
  constexpr int kN = kLanes<T>;
  BitWriter writer(words, begin * view.pixels);
  T* const first = out;
  for (int64_t plane = begin; plane < end;) {
    const int64_t channel = plane % view.channels;
    const T* data = view.data + plane / view.channels * view.outer_stride + channel * view.channel_stride;
    const int64_t pixels = std::min(view.pixels, view.numel - plane * view.pixels);
    if (view.pixel_stride == 1) {
      out += compress_run(data, pixels, threshold, out, writer);
      ++plane;
    } else if (view.channel_stride == 1 && std::min(view.channels - channel, end - plane) >= kN) {
      gather_channels(data, pixels, view.pixel_stride, scratch);
      out += compress_run(scratch, kN * pixels, threshold, out, writer);
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

// Write planes [begin, end) from the packed form, dropped elements zero.
template <typename T>
void decompress_planes(const PackedView<T>& packed, const PlanesView<T>& view, int64_t begin, int64_t end) {
  const T* value = packed.values + rank(packed, begin * view.pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    T* out = view.data + plane / view.channels * view.outer_stride + plane % view.channels * view.channel_stride;
    const int64_t pixels = std::min(view.pixels, view.numel - plane * view.pixels);
    for (int64_t i = 0; i < pixels; ++i) out[i * view.pixel_stride] = 0;
    for_each_bit(packed.words, plane * view.pixels, plane * view.pixels + pixels,
                 [&](int64_t i) { out[i * view.pixel_stride] = *value++; });
  }
}
