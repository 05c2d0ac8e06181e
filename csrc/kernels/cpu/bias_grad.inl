// Sums over all pixels of each channel. Every sum adds its pixels one by one in logical order, whatever the strides.

// sums[channel] += each of `count` pixels that lie evenly.
template <typename T>
void add_pixels(const ImageView<const T>& image, const T* data, int64_t count, T* sums) {
  constexpr int kN = kLanes<T>;
  const int64_t whole = image.channels / kN * kN, step = image.column_stride;
  int64_t channel = 0;
  if (image.channel_stride == 1) {
    auto add = [&]<int kPixels>(const T* from) {
      for (int64_t c = 0; c < whole; c += kN) {
        Vec<T> sum = load_unaligned(sums + c);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i) sum += load_unaligned(from + i * step + c);
        store_unaligned(sums + c, sum);
      }
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) add.template operator()<8>(data + i * step);
    for (; i < count; ++i) add.template operator()<1>(data + i * step);
    channel = whole;
  } else if (step == 1) {
    for (; channel < whole; channel += kN) {
      const T* const from = data + channel * image.channel_stride;
      alignas(64) T square[kN * kN];
      Vec<T> sum = load_unaligned(sums + channel);
      int64_t i = 0;
      for (; i + kN <= count; i += kN) {
        transpose<T>([&](int k) { return from + k * image.channel_stride + i; },
                     [&](int k) { return square + k * kN; });
#pragma GCC unroll 16
        for (int k = 0; k < kN; ++k) sum += load(square + k * kN);
      }
      store_unaligned(sums + channel, sum);
      for (int k = 0; k < kN; ++k) {
        for (int64_t j = i; j < count; ++j) sums[channel + k] += from[k * image.channel_stride + j];
      }
    }
  }
  for (; channel < image.channels; ++channel) {
    T sum = sums[channel];
    for (int64_t i = 0; i < count; ++i) sum += data[channel * image.channel_stride + i * step];
    sums[channel] = sum;
  }
}

// sums[part][channel] for parts [begin, end) of `part` pixels each, the last one of what is left.
template <typename T>
void sum_parts(const ImageView<const T>& image, int64_t part, int64_t begin, int64_t end, T* sums) {
  constexpr int kN = kLanes<T>;
  const int64_t pixels = image.batch * image.height * image.width;
  for (int64_t index = begin; index < end;) {
    T* const out = sums + index * image.channels;
    std::fill_n(out, image.channels, T{0});
    const int64_t stop = std::min(pixels, (index + 1) * part);
    for (int64_t pixel = index * part, count; pixel < stop; pixel += count) {
      const int64_t row = pixel / image.width, column = pixel % image.width;
      const T* const data = image.data + row / image.height * image.batch_stride +
                            row % image.height * image.row_stride + column * image.column_stride;
      if (image.channels < kN && pixel == index * part && index + kN <= end && column + kN * part <= image.width) {
        // Few channels: parts that follow each other fill the vectors.
        ImageView<const T> parts = image;
        parts.channels = kN;
        parts.channel_stride = part * image.column_stride;
        for (int64_t channel = 0; channel < image.channels; ++channel) {
          T found[kN] = {};
          add_pixels(parts, data + channel * image.channel_stride, part, found);
          for (int k = 0; k < kN; ++k) out[k * image.channels + channel] = found[k];
        }
        index += kN - 1;
        break;
      }
      count = std::min(stop - pixel, image.width - column);
      add_pixels(image, data, count, out);
    }
    ++index;
  }
}

// Channels whose totals are held together.
inline constexpr int64_t kTotals = 256;

// result[channel] = the sum of `parts` sums of each of `channels`, for channels [begin, end).
template <typename T>
void add_parts(const T* sums, int64_t parts, int64_t channels, int64_t begin, int64_t end, T* result) {
  for (int64_t first = begin; first < end; first += kTotals) {
    const int64_t count = std::min(kTotals, end - first);
    double totals[kTotals] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const T* const from = sums + part * channels + first;
      for (int64_t c = 0; c < count; ++c) totals[c] += from[c];
    }
    for (int64_t c = 0; c < count; ++c) result[first + c] = static_cast<T>(totals[c]);
  }
}
