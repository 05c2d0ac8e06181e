// Reading and writing the bitmap of a packed tensor: rank queries, counting, walking the set bits of a range. Included inside an
// instruction set's namespace and target region, so that counting bits is one instruction where there is one.

inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Set bits in [begin, end).
inline int64_t count_bits(const uint64_t* words, int64_t begin, int64_t end) {
  if (begin >= end) return 0;
  const int64_t first = begin / 64, last = (end - 1) / 64;
  const uint64_t head = ~low_bits(begin % 64), tail = low_bits((end - 1) % 64 + 1);
  if (first == last) return __builtin_popcountll(words[first] & head & tail);
  int64_t count = __builtin_popcountll(words[first] & head) + __builtin_popcountll(words[last] & tail);
  for (int64_t i = first + 1; i < last; ++i) count += __builtin_popcountll(words[i]);
  return count;
}

// Kept elements before element `position`: where its value would stand in `values`.
template <typename T>
inline int64_t rank(const PackedView<T>& packed, int64_t position) {
  if (position >= packed.numel) position = packed.numel;
  if (position == 0) return 0;
  // The last block answers for position == numel, whose own block may not exist.
  const int64_t block = (position - 1) / kBlockBits;
  return packed.ranks[block] + count_bits(packed.words, block * kBlockBits, position);
}

// Call f(position - begin) for every set bit of [begin, end), in order.
template <typename F>
inline void for_each_bit(const uint64_t* words, int64_t begin, int64_t end, F&& f) {
  if (begin >= end) return;
  const int64_t first = begin / 64, last = (end - 1) / 64;
  for (int64_t i = first; i <= last; ++i) {
    uint64_t word = words[i];
    if (i == first) word &= ~low_bits(begin % 64);
    if (i == last) word &= low_bits((end - 1) % 64 + 1);
    const int64_t base = i * 64 - begin;
    for (; word != 0; word &= word - 1) f(base + __builtin_ctzll(word));
  }
}

// Transpose 8 x 8 bits: bit 8 * i + j moves to 8 * j + i.
inline uint64_t transpose_bits(uint64_t x) {
  auto swap = [&x](uint64_t mask, int shift) {
    const uint64_t t = (x ^ (x >> shift)) & mask;
    x ^= t ^ (t << shift);
  };
  swap(0x00aa00aa00aa00aa, 7);
  swap(0x0000cccc0000cccc, 14);
  swap(0x00000000f0f0f0f0, 28);
  return x;
}

// Appends bits to a zeroed bitmap from any position. Words that another writer may share are merged atomically.
class BitWriter {
 public:
  BitWriter(uint64_t* words, int64_t position)
      : word_(words + position / 64), filled_(static_cast<int>(position % 64)), shared_(filled_ != 0) {}
  BitWriter(const BitWriter&) = delete;
  BitWriter& operator=(const BitWriter&) = delete;
  ~BitWriter() {
    if (filled_ != 0) merge();
  }

  // Append the low `count` bits of `bits`; the others must be 0 and 0 < count < 64.
  void push(uint64_t bits, int count) {
    pending_ |= bits << filled_;
    filled_ += count;
    if (filled_ >= 64) {
      if (shared_) {
        merge();
      } else {
        *word_ = pending_;
      }
      shared_ = false;
      ++word_;
      filled_ -= 64;
      pending_ = filled_ == 0 ? 0 : bits >> (count - filled_);
    }
  }

  // The same for 0 < count <= 64.
  void push_word(uint64_t bits, int count) {
    if (count > 32) {
      push(bits & 0xffffffff, 32);
      bits >>= 32;
      count -= 32;
    }
    push(bits, count);
  }

 private:
  void merge() { std::atomic_ref<uint64_t>(*word_).fetch_or(pending_, std::memory_order_relaxed); }

  uint64_t* word_;
  uint64_t pending_ = 0;
  int filled_;
  bool shared_;
};
