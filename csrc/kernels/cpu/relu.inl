// ReLU, and the bits that its backward pass needs: one an element in memory order, 64 to a word, lowest bit first.

// output = input where it is above zero or NaN, else 0 (-0 stays -0), for words [begin, end) of 64 elements. They may be the same.
template <typename T>
void relu_words(const T* input, int64_t numel, int64_t begin, int64_t end, T* output, uint64_t* words) {
  constexpr int kN = kLanes<T>;
  auto whole = [](const T* from, T* to) -> uint64_t {
    uint64_t word = 0;
    for (int i = 0; i < 64; i += kN) {
      const Vec<T> v = load_unaligned(from + i);
      store_unaligned<T>(to + i, v < 0 ? Vec<T>{} : v);
      word |= uint64_t{passing_bits<T>(v)} << i;
    }
    return word;
  };
  const int64_t last = std::min(end, numel / 64);
  for (int64_t i = begin; i < last; ++i) words[i] = whole(input + i * 64, output + i * 64);
  if (last == end) return;
  T padded[64] = {};
  std::copy(input + last * 64, input + numel, padded);
  words[last] = whole(padded, padded);
  std::copy_n(padded, numel - last * 64, output + last * 64);
}

// output = input where the bit is set, else 0, for words [begin, end) of 64 elements. They may be the same.
template <typename T>
void mask_words(const T* input, const uint64_t* words, int64_t numel, int64_t begin, int64_t end, T* output) {
  constexpr int kN = kLanes<T>;
  auto whole = [](const T* from, uint64_t word, T* to) {
    for (int i = 0; i < 64; i += kN) {
      store_unaligned<T>(to + i, where_bits<T>(load_unaligned(from + i), static_cast<uint32_t>(word >> i)));
    }
  };
  const int64_t last = std::min(end, numel / 64);
  for (int64_t i = begin; i < last; ++i) whole(input + i * 64, words[i], output + i * 64);
  if (last == end) return;
  T padded[64] = {};
  std::copy(input + last * 64, input + numel, padded);
  whole(padded, words[last], padded);
  std::copy_n(padded, numel - last * 64, output + last * 64);
}
