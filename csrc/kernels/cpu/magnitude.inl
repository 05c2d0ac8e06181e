// Radix selection of the k-th largest magnitude: histograms of one digit of |v|'s bits at a time, highest first. The bits of a
// non-negative IEEE number order as the number does, with NaN above infinity.

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// counts[d] += elements of data[begin, end) whose magnitude has digit d at `shift` and equals `prefix` above it.
template <typename T>
void magnitude_histogram(const T* data, int64_t begin, int64_t end, uint64_t prefix, int shift, int64_t* counts) {
  constexpr int kBits = sizeof(T) * 8 - 1;  // without the sign
  constexpr Bits<T> kMask = ~Bits<T>{0} >> 1;
  constexpr uint32_t kDigitMask = kMagnitudeDigits - 1;
  // Neighbours often share a digit (after a ReLU, zero): separate counters keep the additions from waiting for each other.
  constexpr int kCopies = 4;
  alignas(64) uint32_t local[kCopies][kMagnitudeDigits] = {};
  const bool all = shift + kMagnitudeDigitBits >= kBits;
  for (int64_t i = begin; i < end;) {
    // Counters are 32 bits wide: empty them before they can overflow.
    const int64_t stop = std::min(end, i + (int64_t{1} << 30));
    for (; i + kCopies <= stop; i += kCopies) {
      for (int j = 0; j < kCopies; ++j) {
        const Bits<T> key = std::bit_cast<Bits<T>>(data[i + j]) & kMask;
        if (all || (key >> (shift + kMagnitudeDigitBits)) == prefix) ++local[j][(key >> shift) & kDigitMask];
      }
    }
    for (; i < stop; ++i) {
      const Bits<T> key = std::bit_cast<Bits<T>>(data[i]) & kMask;
      if (all || (key >> (shift + kMagnitudeDigitBits)) == prefix) ++local[0][(key >> shift) & kDigitMask];
    }
    for (int j = 0; j < kCopies; ++j) {
      for (int d = 0; d < kMagnitudeDigits; ++d) counts[d] += std::exchange(local[j][d], 0u);
    }
  }
}
