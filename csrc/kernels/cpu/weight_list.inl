// From a packed weight to the lists that the gather kernel walks: for every channel block, for every output row, its non-zero
// weights with the byte offset of their pixels in the packed tile.

// Forward pass: rows are output channels [begin, end). Counts the entries of each row's lists.
template <typename T>
void count_forward_lists(const WeightListParams<T>& p, int64_t begin, int64_t end) {
  const int64_t slice = p.group_in * p.taps, chunk = p.block_channels * p.taps;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t group = row / p.group_out;
    for (int64_t k = 0; k < p.blocks_per_group; ++k) {
      const ChannelBlock& block = p.blocks[group / p.groups_per_block * p.blocks_per_group + k];
      p.starts[block.list + row - block.row_begin] =
          count_bits(p.weight.words, row * slice + k * chunk, row * slice + std::min(slice, (k + 1) * chunk));
    }
  }
}

template <typename T>
void fill_forward_lists(const WeightListParams<T>& p, int64_t begin, int64_t end) {
  const int64_t slice = p.group_in * p.taps, chunk = p.block_channels * p.taps;
  if (begin >= end) return;
  const T* value = p.weight.values + rank(p.weight, begin * slice);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t group = row / p.group_out;
    const int64_t base = group % p.groups_per_block * p.group_in * p.channel_bytes;
    for (int64_t k = 0; k < p.blocks_per_group; ++k) {
      const ChannelBlock& block = p.blocks[group / p.groups_per_block * p.blocks_per_group + k];
      GatherEntry<T>* out = p.entries + p.starts[block.list + row - block.row_begin];
      const int32_t* offset = p.element_offset + k * chunk;
      for_each_bit(
          p.weight.words, row * slice + k * chunk, row * slice + std::min(slice, (k + 1) * chunk),
          [&](int64_t element) { *out++ = {*value++, static_cast<decltype(out->offset)>(base + offset[element])}; });
    }
  }
}

// Input gradient: rows are input channels, and channel blocks cover output channels. Calls f(list, value index, entry's offset)
// for every weight of block `b` that takes part, output channel by output channel.
template <typename T, typename F>
inline void for_each_backward(const WeightListParams<T>& p, int64_t b, F&& f) {
  const int64_t slice = p.group_in * p.taps;
  const ChannelBlock& block = p.blocks[b];
  for (int64_t channel = block.channel_begin; channel < block.channel_end; ++channel) {
    const int64_t list = block.list + channel / p.group_out * p.group_in - block.row_begin;
    const int64_t base = (channel - block.channel_begin) * p.channel_bytes;
    int64_t index = rank(p.weight, channel * slice);
    for_each_bit(p.weight.words, channel * slice, (channel + 1) * slice, [&](int64_t element) {
      const int32_t offset = p.element_offset[element];
      if (offset != WeightListParams<T>::kAbsent) f(list + p.element_row[element], index, base + offset);
      ++index;
    });
  }
}

// Counts the entries of the lists of channel blocks [begin, end), whose counts are zero before.
template <typename T>
void count_backward_lists(const WeightListParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    for_each_backward(p, b, [&](int64_t list, int64_t, int64_t) { ++p.starts[list]; });
  }
}

// Fills them. Every start moves to the end of its list: the start of the next.
template <typename T>
void fill_backward_lists(const WeightListParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    for_each_backward(p, b, [&](int64_t list, int64_t index, int64_t offset) {
      p.entries[p.starts[list]++] = {p.weight.values[index], static_cast<decltype(GatherEntry<T>::offset)>(offset)};
    });
  }
}
