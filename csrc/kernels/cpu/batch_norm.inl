// Batch normalisation in two passes over memory each way: sums per channel, then the elements. Sums are in double whatever T is, so
// that a mean far above the deviation, or an outlier, costs no accuracy.

inline constexpr int64_t kBatchNormRun = 2048;  // elements read together, so that they stay in cache
inline constexpr int64_t kLeastRows = 16;       // but sums are loaded and stored once a run

// kLanes<double> elements as doubles. (GCC splits the vector types' conversion into narrower ones.)
inline Vec<double> load_double(const double* p) { return load_unaligned(p); }
inline Vec<double> load_double(const float* p) {
#if SWAT_INTRINSICS == 512
  return reinterpret_cast<Vec<double>>(_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p)));
#elif SWAT_INTRINSICS == 256
  return reinterpret_cast<Vec<double>>(_mm256_cvtps_pd(_mm_loadu_ps(p)));
#else
  using Part = float __attribute__((vector_size(kVectorBytes / 2), aligned(4)));
  return __builtin_convertvector(*reinterpret_cast<const Part*>(p), Vec<double>);
#endif
}

// Ask for what the next run reads: within a run the passes over strips of channels would hide from the hardware that memory is read
// from end to end.
template <typename T>
inline void prefetch_run(const T* data, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(data + i);
}

// sum += u and product += u * v, where v = x - shift, and u = v if kSquares, else the gradient.
template <bool kSquares, int kVectors, typename T>
inline void add_channels(const T* x, const T* grad, int64_t rows, int64_t stride, const double* shift, double* sum,
                         double* product) {
  constexpr int kN = kLanes<double>;
  Vec<double> s[kVectors], p[kVectors], m[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    s[i] = load_unaligned(sum + i * kN);
    p[i] = load_unaligned(product + i * kN);
    m[i] = load_unaligned(shift + i * kN);
  }
  for (int64_t r = 0; r < rows; ++r, x += stride, grad += stride) {
    for (int i = 0; i < kVectors; ++i) {
      const Vec<double> v = load_double(x + i * kN) - m[i];
      const Vec<double> u = kSquares ? v : load_double(grad + i * kN);
      s[i] += u;
      p[i] += u * v;
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    store_unaligned(sum + i * kN, s[i]);
    store_unaligned(product + i * kN, p[i]);
  }
}

// The same for rows of all channels.
template <bool kSquares, typename T>
void add_rows(const T* x, const T* grad, int64_t rows, int64_t channels, const double* shift, double* sum,
              double* product) {
  constexpr int kN = kLanes<double>;
  int64_t c = 0;
  for (; c + 4 * kN <= channels; c += 4 * kN) {
    add_channels<kSquares, 4>(x + c, grad + c, rows, channels, shift + c, sum + c, product + c);
  }
  for (; c + kN <= channels; c += kN) {
    add_channels<kSquares, 1>(x + c, grad + c, rows, channels, shift + c, sum + c, product + c);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = c; k < channels; ++k) {
      const double v = x[r * channels + k] - shift[k];
      const double u = kSquares ? v : grad[r * channels + k];
      sum[k] += u;
      product[k] += u * v;
    }
  }
}

// The same for pixels of one channel.
template <bool kSquares, typename T>
void add_plane(const T* x, const T* grad, int64_t pixels, double shift, double* sum, double* product) {
  constexpr int kN = kLanes<double>, kVectors = 4;
  Vec<double> s[kVectors] = {}, p[kVectors] = {};
  int64_t i = 0;
  auto add = [&](int64_t at, int k) {
    const Vec<double> v = load_double(x + at) - shift;
    const Vec<double> u = kSquares ? v : load_double(grad + at);
    s[k] += u;
    p[k] += u * v;
  };
  for (; i + kVectors * kN <= pixels; i += kVectors * kN) {
    for (int k = 0; k < kVectors; ++k) add(i + k * kN, k);
  }
  for (; i + kN <= pixels; i += kN) add(i, 0);
  const Vec<double> all_s = (s[0] + s[1]) + (s[2] + s[3]), all_p = (p[0] + p[1]) + (p[2] + p[3]);
  double total = 0, total_product = 0;
  for (int k = 0; k < kN; ++k) {
    total += all_s[k];
    total_product += all_p[k];
  }
  for (; i < pixels; ++i) {
    const double v = x[i] - shift;
    const double u = kSquares ? v : grad[i];
    total += u;
    total_product += u * v;
  }
  *sum += total;
  *product += total_product;
}

template <typename T>
void add_extremes_rows(const T* x, int64_t rows, int64_t channels, T* least, T* greatest) {
  constexpr int kN = kLanes<T>;
  int64_t c = 0;
  for (; c + kN <= channels; c += kN) {
    Vec<T> low = load_unaligned(least + c), high = load_unaligned(greatest + c);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> v = load_unaligned(x + r * channels + c);
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    store_unaligned<T>(least + c, low);
    store_unaligned<T>(greatest + c, high);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = c; k < channels; ++k) {
      least[k] = std::min(least[k], x[r * channels + k]);
      greatest[k] = std::max(greatest[k], x[r * channels + k]);
    }
  }
}

template <typename T>
void add_extremes_plane(const T* x, int64_t pixels, T* least, T* greatest) {
  constexpr int kN = kLanes<T>;
  int64_t i = 0;
  Vec<T> low = broadcast(*least), high = broadcast(*greatest);
  for (; i + kN <= pixels; i += kN) {
    const Vec<T> v = load_unaligned(x + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  for (int k = 0; k < kN; ++k) {
    *least = std::min(*least, low[k]);
    *greatest = std::max(*greatest, high[k]);
  }
  for (; i < pixels; ++i) {
    *least = std::min(*least, x[i]);
    *greatest = std::max(*greatest, x[i]);
  }
}

// ---- What the backward pass reads -------------------------------------------------------------------------------------------

// The saved values of `count` elements from `begin`: where they lie, or read from their codes into `scratch`.
template <typename T>
const T* saved_run(const BatchNormParams<T>& params, int64_t begin, int64_t count, T* scratch) {
  if (params.saved == Saved::exact) return params.input + begin;
  if (params.saved == Saved::int8) {
    const int8_t* codes = static_cast<const int8_t*>(params.saved_codes) + begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<T>(codes[i]);
  } else {
    const uint16_t* codes = static_cast<const uint16_t*>(params.saved_codes) + begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) scratch[i] = std::bit_cast<float>(static_cast<uint32_t>(codes[i]) << 16);
  }
  return scratch;
}

// ---- Sums -------------------------------------------------------------------------------------------------------------------

// The first of `count` things that part `i` of `parts` covers.
inline int64_t part_begin(int64_t count, int64_t i, int64_t parts) { return count * i / parts; }

// Call rows(part, first row, rows) or planes(part, first channel, channels, first element, elements of each) for what task `task`
// sums, in contiguous runs that fit the scratch.
template <typename Rows, typename Planes>
void for_each_run(const BatchNormShape& shape, int64_t task, Rows&& rows, Planes&& planes) {
  if (shape.channels_last) {
    const int64_t step = std::max(kLeastRows, kBatchNormRun / shape.channels);
    const int64_t end = part_begin(shape.lines, task + 1, shape.parts);
    for (int64_t row = part_begin(shape.lines, task, shape.parts); row < end; row += step) {
      rows(task, row, std::min(step, end - row));
    }
    return;
  }
  const int64_t together = std::max<int64_t>(1, kBatchNormRun / shape.pixels);
  const int64_t part = task / shape.chunks(), first = task % shape.chunks() * shape.chunk;
  const int64_t last = std::min(shape.channels, first + shape.chunk);
  for (int64_t n = part_begin(shape.batch, part, shape.parts); n < part_begin(shape.batch, part + 1, shape.parts);
       ++n) {
    for (int64_t c = first; c < last; c += together) {
      const int64_t begin = (n * shape.channels + c) * shape.pixels;
      for (int64_t i = 0; i < shape.pixels; i += kBatchNormRun) {
        planes(part, c, std::min(together, last - c), begin + i, std::min(kBatchNormRun, shape.pixels - i));
      }
    }
  }
}

// sums and products of input - shift and its square, and the extremes of the input, for tasks [begin, end).
template <typename T>
void batch_norm_statistics(const BatchNormParams<T>& params, int64_t begin, int64_t end) {
  const int64_t channels = params.shape.channels;
  for (int64_t task = begin; task < end; ++task) {
    for_each_run(
        params.shape, task,
        [&](int64_t part, int64_t row, int64_t rows) {
          const T* x = params.input + row * channels;
          const int64_t at = part * channels;
          prefetch_run(x + rows * channels, rows * channels);
          add_rows<true>(x, x, rows, channels, params.shift, params.sums + at, params.products + at);
          if (params.least != nullptr) {
            add_extremes_rows(x, rows, channels, params.least + at, params.greatest + at);
          }
        },
        [&](int64_t part, int64_t c, int64_t planes, int64_t first, int64_t count) {
          for (int64_t i = 0; i < planes; ++i) {
            const T* x = params.input + first + i * count;
            const int64_t at = part * channels + c + i;
            add_plane<true>(x, x, count, params.shift[c + i], params.sums + at, params.products + at);
            if (params.least != nullptr) add_extremes_plane(x, count, params.least + at, params.greatest + at);
          }
        });
  }
}

// Elements of scratch that one thread's batch_norm_sums or batch_norm_input_grad needs.
template <typename T>
int64_t batch_norm_scratch(const BatchNormShape& shape) {
  return std::max({kBatchNormRun, kLeastRows * shape.channels, shape.block_lines * shape.line});
}

// sums of the gradient and products with saved - shift, for tasks [begin, end).
template <typename T>
void batch_norm_sums(const BatchNormParams<T>& params, int64_t begin, int64_t end, T* scratch) {
  const int64_t channels = params.shape.channels;
  for (int64_t task = begin; task < end; ++task) {
    for_each_run(
        params.shape, task,
        [&](int64_t part, int64_t row, int64_t rows) {
          const int64_t count = rows * channels;
          const T* grad = params.grad_output + row * channels;
          prefetch_run(grad + count, count);
          if (params.saved == Saved::exact) prefetch_run(params.input + row * channels + count, count);
          const T* saved = saved_run(params, row * channels, count, scratch);
          const int64_t at = part * channels;
          add_rows<false>(saved, grad, rows, channels, params.shift, params.sums + at, params.products + at);
        },
        [&](int64_t part, int64_t c, int64_t planes, int64_t first, int64_t count) {
          const T* grad = params.grad_output + first;
          const T* saved = saved_run(params, first, planes * count, scratch);
          for (int64_t i = 0; i < planes; ++i) {
            const int64_t at = part * channels + c + i;
            add_plane<false>(saved + i * count, grad + i * count, count, params.shift[c + i], params.sums + at,
                             params.products + at);
          }
        });
  }
}

// ---- Elements ---------------------------------------------------------------------------------------------------------------

template <typename T>
inline uint16_t bf16_code(T value) {
  const float narrow = static_cast<float>(value);
  const uint32_t bits = std::bit_cast<uint32_t>(narrow);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(narrow != narrow ? 0x7FC0u : rounded);
}

// For blocks [begin, end): f(first element, elements, at), where at(i) is the channel of the i-th. Two loops, not one, so that each is
// vectorised: along a row all channels differ, in a plane there is one.
template <typename F>
inline void for_each_line(const BatchNormShape& shape, int64_t block, F&& f) {
  const int64_t last = std::min(shape.lines, (block + 1) * shape.block_lines);
  for (int64_t i = block * shape.block_lines; i < last; ++i) {
    if (shape.channels_last) {
      f(i * shape.line, [](int64_t k) { return k; });
    } else {
      const int64_t c = i % shape.channels;
      f(i * shape.line, [c](int64_t) { return c; });
    }
  }
}

// output and codes, for blocks [begin, end).
template <typename T>
void batch_norm_normalise(const BatchNormParams<T>& params, int64_t begin, int64_t end) {
  const BatchNormShape& shape = params.shape;
  const int64_t line = shape.line;
  for (int64_t block = begin; block < end; ++block) {
    for_each_line(shape, block, [&](int64_t first, auto at) {
      const T *x = params.input + first, *center = params.center;
      {
        const T *factor = params.factor, *offset = params.offset;
        T* y = params.output + first;
#pragma GCC ivdep
        for (int64_t i = 0; i < line; ++i) y[i] = (x[i] - center[at(i)]) * factor[at(i)] + offset[at(i)];
      }
      const T *factor = params.code_factor, *offset = params.code_offset;
      if (params.saved == Saved::int8) {
        int8_t* codes = static_cast<int8_t*>(params.codes) + first;
        const uint32_t* keys = params.keys;
        const uint32_t index = static_cast<uint32_t>(first);
#pragma GCC ivdep
        for (int64_t i = 0; i < line; ++i) {
          codes[i] = int8_code<T>((x[i] - center[at(i)]) * factor[at(i)] + offset[at(i)],
                                  random_fraction(index + static_cast<uint32_t>(i), keys[at(i)]));
        }
      } else if (params.saved == Saved::bf16) {
        uint16_t* codes = static_cast<uint16_t*>(params.codes) + first;
#pragma GCC ivdep
        for (int64_t i = 0; i < line; ++i) {
          codes[i] = bf16_code<T>((x[i] - center[at(i)]) * factor[at(i)] + offset[at(i)]);
        }
      }
    });
  }
}

// grad_input, for blocks [begin, end).
template <typename T>
void batch_norm_input_grad(const BatchNormParams<T>& params, int64_t begin, int64_t end, T* scratch) {
  const BatchNormShape& shape = params.shape;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * shape.block_lines * shape.line;
    const int64_t count = std::min(shape.numel() - start, shape.block_lines * shape.line);
    const T* const values = saved_run(params, start, count, scratch);
    for_each_line(shape, block, [&](int64_t first, auto at) {
      const T *grad = params.grad_output + first, *value = values + (first - start);
      const T *center = params.center, *slope = params.slope, *grade = params.grade, *offset = params.offset;
      T* out = params.output + first;
#pragma GCC ivdep
      for (int64_t i = 0; i < shape.line; ++i) {
        out[i] = grad[i] * slope[at(i)] + ((value[i] - center[at(i)]) * grade[at(i)] + offset[at(i)]);
      }
    });
  }
}
