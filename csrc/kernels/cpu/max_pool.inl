// Max pooling, which keeps for each maximum its position in the window: row * kernel_width + column. As in torch, of equal values the
// first wins, and of NaN, which counts as largest, the last.

// Taps [begin, end) of a window along one axis that lie inside the input.
struct Taps {
  int64_t begin, end;
};
inline Taps taps_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
  return {begin, start < size ? std::min(kernel, ceil_div(size - start, dilation)) : 0};
}

// kVectors vectors of channels of one window; `first` points at its tap (0, 0), inside the input or not.
template <int kVectors, typename T>
inline void max_of_window(const MaxPoolShape& shape, const T* first, Taps rows, Taps columns, T* output,
                          uint8_t* positions) {
  constexpr int kN = kLanes<T>;
  const int64_t row_step = shape.dilation_height * shape.width * shape.channels;
  const int64_t column_step = shape.dilation_width * shape.channels;
  Vec<T> best[kVectors];
  Lanes<T> where[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    best[i] = broadcast(-std::numeric_limits<T>::infinity());
    where[i] = Lanes<T>{} + static_cast<int32_t>(rows.begin * shape.kernel_width + columns.begin);
  }
  for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
    for (int64_t kw = columns.begin; kw < columns.end; ++kw) {
      const T* from = first + (kh * row_step + kw * column_step);
      const Lanes<T> tap = Lanes<T>{} + static_cast<int32_t>(kh * shape.kernel_width + kw);
      for (int i = 0; i < kVectors; ++i) {
        const Vec<T> v = load_unaligned(from + i * kN);
        const Lanes<T> takes = (v > best[i]) | (v != v);
        best[i] = takes ? v : best[i];
        where[i] = takes ? tap : where[i];
      }
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    store_unaligned<T>(output + i * kN, best[i]);
    store_bytes<T>(positions + i * kN, where[i]);
  }
}

// The same for one channel, `step` elements from one column to the next.
template <typename T>
inline void max_of_window(const MaxPoolShape& shape, const T* first, int64_t step, Taps rows, Taps columns, T* output,
                          uint8_t* position) {
  T best = -std::numeric_limits<T>::infinity();
  int64_t where = rows.begin * shape.kernel_width + columns.begin;
  for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
    const T* from = first + kh * shape.dilation_height * shape.width * step;
    for (int64_t kw = columns.begin; kw < columns.end; ++kw) {
      const T v = from[kw * shape.dilation_width * step];
      const bool takes = v > best || v != v;
      best = takes ? v : best;
      where = takes ? kh * shape.kernel_width + kw : where;
    }
  }
  *output = best;
  *position = static_cast<uint8_t>(where);
}

// output and positions of rows [begin, end): of all samples in channels_last, of all planes otherwise.
template <typename T>
void max_pool_rows(const MaxPoolShape& shape, const T* input, int64_t begin, int64_t end, T* output,
                   uint8_t* positions) {
  constexpr int kN = kLanes<T>;
  const int64_t step = shape.channels_last ? shape.channels : 1;  // elements of a pixel
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / shape.out_height;
    const int64_t top = row % shape.out_height * shape.stride_height - shape.pad_height;
    const Taps rows = taps_inside(top, shape.kernel_height, shape.dilation_height, shape.height);
    for (int64_t column = 0; column < shape.out_width; ++column) {
      const int64_t left = column * shape.stride_width - shape.pad_width;
      const Taps columns = taps_inside(left, shape.kernel_width, shape.dilation_width, shape.width);
      const T* first = input + ((image * shape.height + top) * shape.width + left) * step;
      const int64_t to = (row * shape.out_width + column) * step;
      int64_t c = 0;
      if (shape.channels_last) {
        for (; c + 4 * kN <= step; c += 4 * kN) {
          max_of_window<4>(shape, first + c, rows, columns, output + to + c, positions + to + c);
        }
        for (; c + kN <= step; c += kN) {
          max_of_window<1>(shape, first + c, rows, columns, output + to + c, positions + to + c);
        }
      }
      for (; c < step; ++c) {
        max_of_window(shape, first + c, step, rows, columns, output + to + c, positions + to + c);
      }
    }
  }
}

// Windows along one axis that an input line at `at` lies in, in ascending order: their indices and their taps there.
inline int64_t windows_over(int64_t at, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t windows,
                            int64_t* index, int64_t* tap) {
  int64_t count = 0;
  for (int64_t k = kernel - 1; k >= 0; --k) {
    const int64_t start = at + pad - k * dilation;
    if (start < 0 || start % stride != 0 || start / stride >= windows) continue;
    index[count] = start / stride;
    tap[count++] = k;
  }
  return count;
}

// Input rows [begin, end) of all samples: each pixel gathers from the windows that it lies in, in torch's order, so that no two
// threads write to one place.
template <typename T>
void max_pool_gather_rows(const MaxPoolShape& shape, const T* grad_output, const uint8_t* positions, int64_t begin,
                          int64_t end, T* grad_input) {
  constexpr int kN = kLanes<T>;
  const int64_t channels = shape.channels;
  int64_t row_index[kMostTaps], row_tap[kMostTaps], column_index[kMostTaps], column_tap[kMostTaps];
  int64_t offset[kMostTaps];
  int32_t tap[kMostTaps];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / shape.height;
    const int64_t rows = windows_over(row % shape.height, shape.kernel_height, shape.stride_height, shape.pad_height,
                                      shape.dilation_height, shape.out_height, row_index, row_tap);
    for (int64_t column = 0; column < shape.width; ++column) {
      const int64_t columns = windows_over(column, shape.kernel_width, shape.stride_width, shape.pad_width,
                                           shape.dilation_width, shape.out_width, column_index, column_tap);
      int64_t count = 0;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          offset[count] = ((image * shape.out_height + row_index[i]) * shape.out_width + column_index[j]) * channels;
          tap[count++] = static_cast<int32_t>(row_tap[i] * shape.kernel_width + column_tap[j]);
        }
      }
      T* to = grad_input + (row * shape.width + column) * channels;
      int64_t c = 0;
      for (; c + kN <= channels; c += kN) {
        Vec<T> sum = {};
        for (int64_t i = 0; i < count; ++i) {
          const Lanes<T> here = load_bytes<T>(positions + offset[i] + c) == tap[i];
          const Vec<T> grad = load_unaligned(grad_output + offset[i] + c);
          sum += reinterpret_cast<Vec<T>>(reinterpret_cast<Lanes<T>>(grad) & here);
        }
        store_unaligned<T>(to + c, sum);
      }
      for (; c < channels; ++c) {
        T sum = 0;
        for (int64_t i = 0; i < count; ++i) {
          sum += positions[offset[i] + c] == tap[i] ? grad_output[offset[i] + c] : T{0};
        }
        to[c] = sum;
      }
    }
  }
}

// Planes [begin, end): each window adds to its maximum.
template <typename T>
void max_pool_scatter_planes(const MaxPoolShape& shape, const T* grad_output, const uint8_t* positions, int64_t begin,
                             int64_t end, T* grad_input) {
  const int64_t outputs = shape.out_height * shape.out_width;
  int64_t row_of[kMostTaps] = {}, column_of[kMostTaps] = {};
  for (int64_t tap = 0; tap < kMostTaps; ++tap) {
    row_of[tap] = tap / shape.kernel_width * shape.dilation_height;
    column_of[tap] = tap % shape.kernel_width * shape.dilation_width;
  }
  for (int64_t plane = begin; plane < end; ++plane) {
    T* const to = grad_input + plane * shape.height * shape.width;
    std::fill_n(to, shape.height * shape.width, T{0});
    const T* grad = grad_output + plane * outputs;
    const uint8_t* position = positions + plane * outputs;
    for (int64_t row = 0; row < shape.out_height; ++row) {
      const int64_t top = row * shape.stride_height - shape.pad_height;
      for (int64_t column = 0; column < shape.out_width; ++column, ++grad, ++position) {
        const int64_t h = top + row_of[*position];
        const int64_t w = column * shape.stride_width - shape.pad_width + column_of[*position];
        // A window of padding alone has no maximum inside; neither need positions that someone made up.
        if (h >= 0 && h < shape.height && w >= 0 && w < shape.width) to[h * shape.width + w] += *grad;
      }
    }
  }
}

template <typename T>
void max_pool_input_grad(const MaxPoolShape& shape, const T* grad_output, const uint8_t* positions, int64_t begin,
                         int64_t end, T* grad_input) {
  if (shape.channels_last) {
    max_pool_gather_rows(shape, grad_output, positions, begin, end, grad_input);
  } else {
    max_pool_scatter_planes(shape, grad_output, positions, begin, end, grad_input);
  }
}
