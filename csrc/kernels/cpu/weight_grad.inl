// Weight gradient from packed activations: dense over all weights, skipping the dropped activations.
//
// For a tile of dy, packed as [pixel][output channel] in L1 with a zero halo: per input channel, walk the list of kept activations
// with the gradients of up to 3 x 3 taps times one vector (or more) of output channels in registers.

// A TapKernel for runs of [kRows, kColumns] taps and kV vectors of output channels.
template <typename T, int kRows, int kColumns, int kV>
void accumulate_taps(const T* grad, const GatherEntry<T>* entry, const GatherEntry<T>* end, const TapRun& run, T* out) {
  constexpr int kWidth = kV * kLanes<T>;
  constexpr int64_t kPixelBytes = kWidth * sizeof(T);
  Vec<T> sum[kRows * kColumns * kV];
  auto place = [&](int r, int c) { return out + (run.tap + r * run.tap_row_step + c * run.tap_column_step) * kWidth; };
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        sum[(r * kColumns + c) * kV + v] = load(place(r, c) + v * kLanes<T>);
      }
    }
  }
  const char* base = reinterpret_cast<const char*>(grad) + run.pixel * kPixelBytes;
  const int64_t row_bytes = run.row_step * kPixelBytes, column_bytes = run.column_step * kPixelBytes;
  for (; entry < end; ++entry) {
    const Vec<T> x = broadcast<T>(entry->weight);
    const char* pixel = base + entry->offset;
#pragma GCC unroll 3
    for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) {
        const T* dy = reinterpret_cast<const T*>(pixel + c * column_bytes + r * row_bytes);
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) sum[(r * kColumns + c) * kV + v] += x * load(dy + v * kLanes<T>);
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) store(place(r, c) + v * kLanes<T>, sum[(r * kColumns + c) * kV + v]);
    }
  }
}

// Vectors of output channels that leave room in the registers for a run of `taps`.
inline constexpr bool fits_registers(int taps, int vectors) { return taps * vectors <= kRegisters - 3; }

template <typename T, int kRows, int kColumns>
TapKernel<T> tap_kernel_of(int64_t vectors) {
  TapKernel<T> kernel = nullptr;
  [&]<int... kV>(std::integer_sequence<int, kV...>) {
    auto offer = [&]<int kVectors>() {
      if constexpr (fits_registers(kRows * kColumns, kVectors)) {
        if (vectors == kVectors) kernel = accumulate_taps<T, kRows, kColumns, kVectors>;
      }
    };
    (offer.template operator()<1 << kV>(), ...);
  }(std::make_integer_sequence<int, 4>{});
  return kernel;
}

// The kernel of a run, or null if there is none that wide.
template <typename T>
TapKernel<T> tap_kernel(const TapRun& run, int64_t vectors) {
  TapKernel<T> kernel = nullptr;
  [&]<int... kI>(std::integer_sequence<int, kI...>) {
    ((run.rows == kI / 3 + 1 && run.columns == kI % 3 + 1
          ? void(kernel = tap_kernel_of<T, kI / 3 + 1, kI % 3 + 1>(vectors))
          : void()),
     ...);
  }(std::make_integer_sequence<int, 9>{});
  return kernel;
}

// Most vectors of output channels for which every run of `taps` taps has a kernel.
inline int64_t weight_grad_vectors(int64_t taps) {
  int64_t vectors = 8;
  while (vectors > 1 && !fits_registers(static_cast<int>(taps), static_cast<int>(vectors))) vectors /= 2;
  return vectors;
}

// One run of `count` pixels of dy for `channels` output channels, as [pixel][vectors * lanes]; channels that do not exist are zero.
template <typename T>
inline void pack_pixels(const ImageView<const T>& dy, int64_t vectors, const T* data, int64_t count, int64_t channels,
                        T* out) {
  constexpr int kN = kLanes<T>;
  const int64_t width = vectors * kN;
  int64_t done = 0;
  if (dy.channel_stride == 1 && channels == width) {
    for (; done < count; ++done, data += dy.column_stride, out += width) {
      for (int64_t v = 0; v < vectors; ++v) store(out + v * kN, load_unaligned(data + v * kN));
    }
  } else if (dy.column_stride == 1 && channels == width) {
    for (; done + kN <= count; done += kN, data += kN, out += kN * width) {
      for (int64_t v = 0; v < vectors; ++v) {
        transpose<T>([&](int i) { return data + (v * kN + i) * dy.channel_stride; },
                     [&](int i) { return out + i * width + v * kN; });
      }
    }
  }
  for (; done < count; ++done, data += dy.column_stride, out += width) {
    for (int64_t k = 0; k < width; ++k) out[k] = k < channels ? data[k * dy.channel_stride] : T{0};
  }
}

// dy of one tile for `channels` output channels from `channel`, as [block][sample][row][column][width], blocks `block_stride`
// apart; pixels that do not exist are zero.
template <typename T>
void pack_grad(const WeightGradParams<T>& p, const TileBounds& b, int64_t channel, int64_t channels, T* out,
               int64_t block_stride) {
  const auto& dy = p.grad_output;
  const int64_t width = p.vectors * kLanes<T>;
  const int64_t first = std::clamp<int64_t>(-b.grad_column, 0, p.grad_columns);
  const int64_t last = std::clamp<int64_t>(dy.width - b.grad_column, first, p.grad_columns);
  for (int64_t s = 0; s < p.tile_samples; ++s) {
    for (int64_t r = 0; r < p.grad_rows; ++r, out += p.grad_columns * width) {
      const int64_t n = b.sample_begin + s, row = b.grad_row + r;
      const bool exists = n < b.sample_end && row >= 0 && row < dy.height;
      // Blocks of one row in turn: its cache lines, which hold several, are read once.
      for (int64_t block = 0; block * width < channels; ++block) {
        T* const to = out + block * block_stride;
        if (!exists) {
          std::fill_n(to, p.grad_columns * width, T{0});
          continue;
        }
        const T* data = dy.data + n * dy.batch_stride + (channel + block * width) * dy.channel_stride +
                        row * dy.row_stride + (b.grad_column + first) * dy.column_stride;
        std::fill_n(to, first * width, T{0});
        pack_pixels(dy, p.vectors, data, last - first, std::min(width, channels - block * width), to + first * width);
        std::fill_n(to + last * width, (p.grad_columns - last) * width, T{0});
      }
    }
  }
}

// Write the finished sums [channel][tap][width] of `count` input channels, from `within` their group, and one block of output
// channels to grad_weight.
template <typename T>
inline void write_grad(const WeightGradParams<T>& p, const T* sums, int64_t group, int64_t block, int64_t within,
                       int64_t count) {
  constexpr int kN = kLanes<T>;
  const ConvGeometry& g = p.geometry;
  const int64_t width = p.vectors * kN, taps = g.taps(), slice = g.group_in() * taps;
  const int64_t outputs = std::min(width, g.group_out() - block * width);
  T* const out = p.grad_weight + (group * g.group_out() + block * width) * slice;
  if (!p.channels_last) {
    for (int64_t o = 0; o < outputs; ++o) {
      T* to = out + o * slice + within * taps;
      for (int64_t i = 0; i < count * taps; ++i) to[i] = sums[i * width + o];
    }
    return;
  }
  const int64_t whole_channels = count / kN * kN, whole_outputs = outputs / kN * kN;
  for (int64_t t = 0; t < taps; ++t) {
    const T* const from = sums + t * width;
    T* const to = out + t * g.group_in() + within;
    auto write = [&](int64_t channel_begin, int64_t channel_end, int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t c = channel_begin; c < channel_end; ++c) to[o * slice + c] = from[c * taps * width + o];
      }
    };
    for (int64_t o = 0; o < whole_outputs; o += kN) {
      for (int64_t c = 0; c < whole_channels; c += kN) {
        transpose<T>([&](int i) { return from + (c + i) * taps * width + o; },
                     [&](int i) { return to + (o + i) * slice + c; });
      }
    }
    write(whole_channels, count, 0, whole_outputs);
    write(0, count, whole_outputs, outputs);
  }
}

// Input channels whose gradients are revisited tile after tile while they are still in L1 or L2.
inline constexpr int64_t kGradChannels = 32;

// Sum one slice of the tiles for input channels [channel_begin, channel_end): into `partial`, or, where one batch holds all tiles,
// straight into grad_weight.
template <typename T>
void weight_grad_slice(const WeightGradParams<T>& p, int64_t slice, int64_t channel_begin, int64_t channel_end,
                       WeightGradScratch<T>& scratch) {
  const ConvGeometry& g = p.geometry;
  const int64_t width = p.vectors * kLanes<T>, channel_sums = g.taps() * width;
  const int64_t output_blocks = (g.group_out() + width - 1) / width;
  const int64_t slice_begin = p.tiles() * slice / p.slices, slice_end = p.tiles() * (slice + 1) / p.slices;
  const int64_t tile_elements = p.tile_samples * p.grad_rows * p.grad_columns * width;
  const int64_t block_elements = p.batch_tiles * tile_elements;
  const int64_t channels = channel_end - channel_begin;
  scratch.grad.reserve(p.blocks_together * block_elements);
  if (p.partial == nullptr) scratch.sums.reserve(kGradChannels * channel_sums);

  int64_t listed_begin = slice_begin, listed_end = slice_begin;
  for (int64_t begin = slice_begin; begin < slice_end; begin += p.batch_tiles) {
    const int64_t end = std::min(slice_end, begin + p.batch_tiles);
    if (begin == listed_end) {
      listed_begin = begin;
      listed_end = std::min(slice_end, begin + p.listed_tiles);
      list_tiles(p, listed_begin, listed_end, channel_begin, channel_end, scratch);
    }
    const GatherEntry<T>* const entries = scratch.entries.data();
    const int64_t* const starts = scratch.starts.data() + (begin - listed_begin) * channels * p.class_count;

    // Gradients of channels [from, to), of one group and one block of output channels, into sums[channel][tap][width].
    auto accumulate = [&](const T* grad, int64_t from, int64_t to, T* sums) {
      for (int64_t tile = 0; tile < end - begin; ++tile, grad += tile_elements) {
        T* out = sums;
        const int64_t* start = starts + (tile * channels + from - channel_begin) * p.class_count;
        for (int64_t channel = from; channel < to; ++channel, out += channel_sums) {
          for (int64_t k = 0; k < p.class_count; ++k, ++start) {
            if (start[0] == start[1]) continue;
            for (int32_t r = p.classes[k].run_begin; r < p.classes[k].run_end; ++r) {
              p.kernels[r](grad, entries + start[0], entries + start[1], p.runs[r], out);
            }
          }
        }
      }
    };

    for (int64_t group = channel_begin / g.group_in(); group * g.group_in() < channel_end; ++group) {
      const int64_t group_channel = group * g.group_in();
      const int64_t from = std::max(channel_begin, group_channel);
      const int64_t to = std::min(channel_end, group_channel + g.group_in());
      for (int64_t packed = 0; packed < output_blocks; packed += p.blocks_together) {
        const int64_t together = std::min(p.blocks_together, output_blocks - packed);
        for (int64_t tile = begin; tile < end; ++tile) {
          pack_grad(p, tile_bounds(p, tile), group * g.group_out() + packed * width,
                    std::min(together * width, g.group_out() - packed * width),
                    scratch.grad.data() + (tile - begin) * tile_elements, block_elements);
        }
        for (int64_t block = packed; block < packed + together; ++block) {
          const T* const grad = scratch.grad.data() + (block - packed) * block_elements;
          for (int64_t some = from; some < to; some += kGradChannels) {
            const int64_t stop = std::min(to, some + kGradChannels);
            if (p.partial != nullptr) {
              accumulate(grad, some, stop,
                         p.partial + (((slice * g.groups + group) * output_blocks + block) * g.group_in() + some -
                                      group_channel) *
                                         channel_sums);
              continue;
            }
            T* const sums = scratch.sums.data();
            std::fill_n(sums, (stop - some) * channel_sums, T{0});
            accumulate(grad, some, stop, sums);
            write_grad(p, sums, group, block, some - group_channel, stop - some);
          }
        }
      }
    }
  }
}

// Add the slices of `partial` and write grad_weight for input channels [begin, end) of all groups.
template <typename T>
void weight_grad_reduce(const WeightGradParams<T>& p, int64_t begin, int64_t end) {
  const ConvGeometry& g = p.geometry;
  const int64_t width = p.vectors * kLanes<T>, channel_sums = g.taps() * width;
  const int64_t output_blocks = (g.group_out() + width - 1) / width;
  const int64_t slice_elements = g.groups * output_blocks * g.group_in() * channel_sums;
  for (int64_t channel = begin, stop = begin; channel < end; channel = stop) {
    const int64_t group = channel / g.group_in(), within = channel % g.group_in();
    stop = std::min({end, channel + kGradChannels, (group + 1) * g.group_in()});
    for (int64_t block = 0; block < output_blocks; ++block) {
      T* const sums = p.partial + ((group * output_blocks + block) * g.group_in() + within) * channel_sums;
      for (int64_t s = 1; s < p.slices; ++s) {
        for (int64_t i = 0; i < (stop - channel) * channel_sums; i += kLanes<T>) {
          store(sums + i, load(sums + i) + load(sums + s * slice_elements + i));
        }
      }
      write_grad(p, sums, group, block, within, stop - channel);
    }
  }
}
