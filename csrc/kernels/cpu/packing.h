// Selection and packing on the CPU: the k-th largest magnitude, compression, decompression.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "parallel.h"
#include "params.h"
#include "table.h"

namespace swat::cpu {

// The k-th largest |data[i]| of `count` elements, 1 <= k <= count; NaN counts as largest.
template <typename T>
T kth_magnitude(const KernelTable& table, const Parallel& parallel, const T* data, int64_t count, int64_t k);

// Pack the elements of `view` that are not below `threshold` in magnitude and not zero. `words` and `ranks` are written whole;
// `allocate(kept)` is called once and returns where the values go.
template <typename T>
void compress(const KernelTable& table, const Parallel& parallel, const PlanesView<const T>& view, T threshold,
              uint64_t* words, int64_t* ranks, const std::function<T*(int64_t kept)>& allocate);

// The number of elements that a mask keeps, or nothing where its ranks do not agree with its bits, or bits are set past `numel`.
std::optional<int64_t> count_kept(const KernelTable& table, const Parallel& parallel, const uint64_t* words,
                                  const int64_t* ranks, int64_t numel);

// The same of a mask that is known to agree: only its last block is read.
int64_t kept_elements(const uint64_t* words, const int64_t* ranks, int64_t numel);

// Of the equal slices that a mask of `numel` elements is cut in, those whose bits are all set, ascending.
std::vector<int64_t> whole_slices(const uint64_t* words, int64_t numel, int64_t slices);

// Write to `values` the elements of `view` whose bits are set in `packed`, whose own values are not read.
template <typename T>
void take(const KernelTable& table, const Parallel& parallel, const PackedView<T>& packed,
          const PlanesView<const T>& view, T* values);

// Write the dense tensor.
template <typename T>
void decompress(const KernelTable& table, const Parallel& parallel, const PackedView<T>& packed,
                const PlanesView<T>& view);

}  // namespace swat::cpu
