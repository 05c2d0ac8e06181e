// From a tensor to its packed form in one pass: a block reads a tile, keeps its bits and kept values in shared memory, learns from
// the tiles before it how many elements they keep (look_back.cuh), and writes. compress_plan.h says what a tile is.
//
// Contiguous and strided tensors: a warp reads 1024 elements, 32 at a time, and a ballot is 32 bits of the bitmap. Channels last: a
// lane reads 32 pixels of a channel, its neighbours read the channels beside it.
#include "compress_plan.h"
#include "compress_planes.h"
#include "launchers.h"
#include "look_back.cuh"

namespace swat::cuda {
namespace {

constexpr uint16_t kNotStaged = 0xffff;  // as a place

// A tile, and what its block holds of it in shared memory. Half h has the bits of logical elements 32 * (first_half + h) and on.
template <typename T>
struct Tile {
  int64_t begin;   // logical index
  int64_t offset;  // in memory, of a tile of planes
  int elements;
  int channels, pixels, runs;  // of a tile of planes
  int shift;                   // of `begin` in its half
  T* staged;                   // kept values: in logical order within 1024, or at each unit's place
  uint32_t* halves;
  int32_t* before;  // kept in the tile before each half
  uint16_t* places;

  SWAT_HOST_DEVICE int64_t first_half() const { return begin / 32; }
  SWAT_HOST_DEVICE int used_halves() const { return (shift + elements + 31) / 32; }
};

template <typename T, Layout kLayout>
__device__ inline Tile<T> tile_at(const ImageView<const T>& input, const PackPlan& plan, int64_t number,
                                  unsigned char* shared) {
  Tile<T> tile{};
  if constexpr (kLayout == Layout::channels_last) {
    const int64_t sample = number / plan.slabs, channel = number % plan.slabs * plan.tile_channels;
    const int64_t left = input.channels - channel;
    tile.pixels = static_cast<int>(input.height * input.width);
    tile.runs = (tile.pixels + 31) / 32;
    tile.channels = left < plan.tile_channels ? static_cast<int>(left) : plan.tile_channels;
    tile.elements = tile.channels * tile.pixels;
    tile.begin = (sample * input.channels + channel) * tile.pixels;
    tile.offset = sample * input.batch_stride + channel;
  } else {
    tile.begin = number * plan.tile_elements;
    const int64_t left = input.numel() - tile.begin;
    tile.elements = left < plan.tile_elements ? static_cast<int>(left) : plan.tile_elements;
  }
  tile.shift = static_cast<int>(tile.begin % 32);
  tile.staged = reinterpret_cast<T*>(shared);
  tile.halves = reinterpret_cast<uint32_t*>(tile.staged + plan.staged);
  tile.before = reinterpret_cast<int32_t*>(tile.halves + plan.halves);
  tile.places = reinterpret_cast<uint16_t*>(tile.before + plan.halves);
  return tile;
}

// Bits and kept values of a run of elements: 1024 at a time, which have room for all of them.
template <typename T, bool kStrided>
__device__ inline void read_run(const Tile<T>& tile, const ImageView<const T>& input, Compute<T> limit, bool staging) {
  constexpr int kBatch = sizeof(T) > 4 ? kBlockHalves / 2 : kBlockHalves;  // values of a lane in registers
  for (int first = threadIdx.x / kWarp * kBlockBits; first < tile.elements; first += kPackWarps * kBlockBits) {
    uint32_t mine = 0;
    T* to = tile.staged + first;
    for (int done = 0; done < kBlockHalves; done += kBatch) {
      T values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + (done + i) * 32 + lane_id();
        const int64_t index = tile.begin + at;
        values[i] = at < tile.elements ? input.data[kStrided ? offset_of(input, index) : index] : from_bits<T>(0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool kept = keeps(values[i], limit);
        const uint32_t bits = __ballot_sync(kAllLanes, kept);
        if (lane_id() == done + i) mine = bits;
        if (kept && staging) to[count_bits(bits & low_bits(lane_id()))] = values[i];
        to += count_bits(bits);
      }
    }
    tile.halves[first / 32 + lane_id()] = mine;
  }
}

// Bits and kept values of planes. Places are given in the order in which warps come: where a value waits cannot be seen.
template <typename T>
__device__ inline void read_planes(const Tile<T>& tile, const PackPlan& plan, const ImageView<const T>& input,
                                   int64_t pixel_step, Compute<T> limit, bool staging, uint32_t* taken) {
  const int units = tile.channels * tile.runs;
  for (int first = threadIdx.x / kWarp * kWarp; first < units; first += kPackThreads) {
    const int unit = first + lane_id(), channel = unit % tile.channels, run = unit / tile.channels;
    const int left = tile.pixels - run * 32, length = unit >= units ? 0 : left < 32 ? left : 32;
    const T* const from = input.data + tile.offset + channel + run * 32 * pixel_step;
    T values[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) values[i] = i < length ? from[i * pixel_step] : from_bits<T>(0);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) bits |= keeps(values[i], limit) ? 1u << i : 0;
    const int position = tile.shift + channel * tile.pixels + run * 32, shift = position % 32;
    if (bits << shift != 0) atomicOr(&tile.halves[position / 32], bits << shift);
    if (shift != 0 && bits >> (32 - shift) != 0) atomicOr(&tile.halves[position / 32 + 1], bits >> (32 - shift));
    if (!staging) continue;
    const int count = count_bits(bits), before = warp_exclusive(count);
    uint32_t start = 0;
    if (lane_id() == kWarp - 1) start = atomicAdd(taken, static_cast<uint32_t>(before + count));
    int place = static_cast<int>(__shfl_sync(kAllLanes, start, kWarp - 1)) + before;
    const bool fits = place + count <= plan.staged;
    if (unit < units) tile.places[channel * tile.runs + run] = fits ? static_cast<uint16_t>(place) : kNotStaged;
    if (!fits) continue;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (bits >> i & 1) tile.staged[place++] = values[i];
    }
  }
}

// Fills `before`; returns what the tile keeps. Every thread calls it.
template <typename T>
__device__ inline int count_tile(const Tile<T>& tile, int* shared) {
  const int halves = tile.used_halves(), each = (halves + kPackThreads - 1) / kPackThreads;
  const int begin = static_cast<int>(threadIdx.x) * each, end = begin + each < halves ? begin + each : halves;
  int sum = 0, total;
  for (int h = begin; h < end; ++h) sum += count_bits(tile.halves[h]);
  int before = block_exclusive(sum, shared, &total);
  for (int h = begin; h < end; ++h) {
    tile.before[h] = before;
    before += count_bits(tile.halves[h]);
  }
  return total;
}

// The bitmap and the rank directory. A word that two tiles share was cleared, and is joined by an integer atomic.
template <typename T>
__device__ inline void write_mask(const Tile<T>& tile, int64_t rank, bool last, uint64_t* words, int64_t* ranks) {
  uint32_t* const to = reinterpret_cast<uint32_t*>(words) + tile.first_half();
  const int halves = tile.used_halves(), end = tile.shift + tile.elements;
  for (int h = threadIdx.x; h < halves; h += kPackThreads) {
    if ((h == 0 && tile.shift != 0) || (h == halves - 1 && end % 32 != 0 && !last)) {
      if (tile.halves[h] != 0) atomicOr(&to[h], tile.halves[h]);
    } else {
      to[h] = tile.halves[h];
    }
  }
  if (last && threadIdx.x == 0 && (tile.first_half() + halves) % 2 != 0) to[halves] = 0;
  const int64_t stop = tile.begin + tile.elements;
  for (int64_t b = ceil_div(tile.begin, kBlockBits) + threadIdx.x; b * kBlockBits < stop; b += kPackThreads) {
    ranks[b] = rank + tile.before[b * kBlockHalves - tile.first_half()];
  }
}

template <typename T>
__device__ inline void write_run(const Tile<T>& tile, int total, int64_t rank, T* values, int64_t capacity) {
  const int halves = tile.used_halves();
  for (int first = threadIdx.x / kWarp * kBlockBits; first < tile.elements; first += kPackWarps * kBlockBits) {
    const int half = first / 32, before = tile.before[half];
    const int count = (half + kBlockHalves < halves ? tile.before[half + kBlockHalves] : total) - before;
    for (int i = lane_id(); i < count; i += kWarp) {
      if (rank + before + i < capacity) values[rank + before + i] = tile.staged[first + i];
    }
  }
}

// A warp takes 32 units that follow each other in logical order, and its lanes write neighbours: each finds the unit that its value
// comes from by bisection.
template <typename T>
__device__ inline void write_planes(const Tile<T>& tile, const ImageView<const T>& input, int64_t pixel_step,
                                    int64_t rank, T* values, int64_t capacity) {
  const int units = tile.channels * tile.runs;
  for (int first = threadIdx.x / kWarp * kWarp; first < units; first += kPackThreads) {
    const int unit = first + lane_id();
    uint32_t bits = 0;
    int place = 0, offset = 0;  // kept in the tile before the unit
    if (unit < units) {
      const int run = unit % tile.runs, left = tile.pixels - run * 32;
      const int position = tile.shift + unit / tile.runs * tile.pixels + run * 32, half = position / 32,
                shift = position % 32;
      bits = tile.halves[half] >> shift;
      if (shift != 0) bits |= tile.halves[half + 1] << (32 - shift);
      bits &= low_bits(left);
      place = tile.places[unit];
      offset = tile.before[half] + count_bits(tile.halves[half] & low_bits(shift));
    }
    const int count = count_bits(bits), before = warp_exclusive(count);
    const int total = __shfl_sync(kAllLanes, before + count, kWarp - 1);
    const int64_t start = rank + __shfl_sync(kAllLanes, offset, 0);
    for (int done = 0; done < total; done += kWarp) {
      const int at = done + lane_id();
      int from = 0;  // the last lane whose values start at or before `at`
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        if (__shfl_sync(kAllLanes, before, from + step) <= at) from += step;
      }
      const int within = at - __shfl_sync(kAllLanes, before, from), its_place = __shfl_sync(kAllLanes, place, from);
      uint32_t its_bits = __shfl_sync(kAllLanes, bits, from);
      if (at >= total || start + at >= capacity) continue;
      if (its_place != kNotStaged) {
        values[start + at] = tile.staged[its_place + within];
      } else {
        for (int i = 0; i < within; ++i) its_bits &= its_bits - 1;
        const int pixel = (first + from) % tile.runs * 32 + count_bits(~its_bits & (its_bits - 1));
        values[start + at] = input.data[tile.offset + (first + from) / tile.runs + pixel * pixel_step];
      }
    }
  }
}

// No tile is begun or known, and words that tiles share are clear.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) prepare_tiles(CompressParams<T> p, PackPlan plan) {
  if (skipped(p.condition)) return;
  uint64_t* const scratch = static_cast<uint64_t*>(p.scratch);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (number == 0) scratch[0] = 0;
  if (number >= plan.tiles) return;
  scratch[1 + number] = kUnknown;
  if (plan.layout != Layout::channels_last) return;
  const int64_t begin = (number / plan.slabs * p.input.channels + number % plan.slabs * plan.tile_channels) *
                        p.input.height * p.input.width;
  if (begin % 32 != 0) reinterpret_cast<uint32_t*>(p.words)[begin / 32] = 0;
}

template <typename T, Layout kLayout>
__global__ void __launch_bounds__(kPackThreads) pack_tiles(CompressParams<T> p, PackPlan plan, int64_t pixel_step) {
  SWAT_DYNAMIC_SHARED(shared);
  SWAT_SHARED(sums, int[kWarp + 1]);
  SWAT_SHARED(taken, uint32_t);
  if (skipped(p.condition)) return;
  uint64_t* const scratch = static_cast<uint64_t*>(p.scratch);
  if (threadIdx.x == 0) taken = 0;
  const int64_t number = next_tile(scratch);
  const Tile<T> tile = tile_at<T, kLayout>(p.input, plan, number, shared);
  const Compute<T> limit = load(*p.threshold);
  const bool staging = p.capacity > 0;
  if constexpr (kLayout == Layout::channels_last) {
    for (int h = threadIdx.x; h < plan.halves; h += kPackThreads) tile.halves[h] = 0;
    __syncthreads();
    read_planes(tile, plan, p.input, pixel_step, limit, staging, &taken);
  } else {
    read_run<T, kLayout == Layout::strided>(tile, p.input, limit, staging);
  }
  __syncthreads();
  const int total = count_tile(tile, sums);
  const bool last = number + 1 == plan.tiles;
  const int64_t rank = block_look_back(scratch, number, total);
  if (last && threadIdx.x == 0) *p.kept = rank + total;
  write_mask(tile, rank, last, p.words, p.ranks);
  if (rank >= p.capacity) return;
  if constexpr (kLayout == Layout::channels_last) {
    write_planes(tile, p.input, pixel_step, rank, p.values, p.capacity);
  } else {
    write_run(tile, total, rank, p.values, p.capacity);
  }
}

template <typename T>
__global__ void compare(const int64_t* kept, int64_t least, int64_t most, const T* threshold, int32_t* condition) {
  *condition = *kept > most || (*kept < least && load(*threshold) > 0);
}

__global__ void __launch_bounds__(kPackThreads)
    trim_blocks(uint32_t* halves, int64_t* ranks, const int64_t* kept, int64_t numel, int64_t capacity) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kPackWarps + threadIdx.x / kWarp;
  if (*kept <= capacity || block * kBlockBits >= numel) return;
  const int64_t rank = ranks[block], half = block * kBlockHalves + lane_id();
  const bool exists = half < 2 * word_count(numel);
  uint32_t bits = exists ? halves[half] : 0;
  int64_t allowed = capacity - rank - warp_exclusive(count_bits(bits));
  const int before = count_bits(bits);
  if (allowed < before) {
    // Dropping the highest set bit until few enough are left.
    for (int left = before; left > (allowed > 0 ? allowed : 0); --left) {
      uint32_t rest = bits;
      while ((rest & (rest - 1)) != 0) rest &= rest - 1;
      bits ^= rest;
    }
    if (exists) halves[half] = bits;
  }
  __syncwarp();
  if (lane_id() == 0 && rank > capacity) ranks[block] = capacity;
}

__global__ void trim_count(int64_t* kept, int64_t capacity) {
  if (*kept > capacity) *kept = capacity;
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads) zero_tail(T* values, const int64_t* kept, int64_t capacity) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t at = *kept + static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; at < capacity;
       at += stride) {
    values[at] = from_bits<T>(0);
  }
}

}  // namespace

template <typename T>
size_t compress_scratch(const CompressParams<T>& p) {
  const PackPlan plan = pack_plan(p.input);
  return plan.two_passes ? compress_planes_scratch(p.input.numel()) : look_back_scratch(plan.tiles);
}

template <typename T>
cudaError_t compress(const CompressParams<T>& p, cudaStream_t stream) {
  if (p.input.numel() == 0) return cudaMemsetAsync(p.kept, 0, sizeof(int64_t), stream);
  const PackPlan plan = pack_plan(p.input);
  if (plan.two_passes) return compress_planes(p, stream);
  const size_t shared = plan.shared(sizeof(T));
  const int64_t pixel_step = pixel_stride(p.input);
  SWAT_LAUNCH(prepare_tiles<T>, ceil_div(plan.tiles, kPackThreads), kPackThreads, 0, stream, p, plan);
  switch (plan.layout) {
    case Layout::contiguous:
      SWAT_LAUNCH((pack_tiles<T, Layout::contiguous>), plan.tiles, kPackThreads, shared, stream, p, plan, pixel_step);
      break;
    case Layout::strided:
      SWAT_LAUNCH((pack_tiles<T, Layout::strided>), plan.tiles, kPackThreads, shared, stream, p, plan, pixel_step);
      break;
    case Layout::channels_last:
      SWAT_LAUNCH((pack_tiles<T, Layout::channels_last>), plan.tiles, kPackThreads, shared, stream, p, plan,
                  pixel_step);
      break;
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t outside(const int64_t* kept, int64_t least, int64_t most, const T* threshold, int32_t* condition,
                    cudaStream_t stream) {
  SWAT_LAUNCH(compare<T>, 1, 1, 0, stream, kept, least, most, threshold, condition);
  return cudaGetLastError();
}

cudaError_t trim(uint64_t* words, int64_t* ranks, int64_t* kept, int64_t numel, int64_t capacity, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  SWAT_LAUNCH(trim_blocks, ceil_div(block_count(numel), kPackWarps), kPackThreads, 0, stream,
              reinterpret_cast<uint32_t*>(words), ranks, kept, numel, capacity);
  SWAT_LAUNCH(trim_count, 1, 1, 0, stream, kept, capacity);
  return cudaGetLastError();
}

template <typename T>
cudaError_t clear_tail(T* values, const int64_t* kept, int64_t capacity, cudaStream_t stream) {
  if (capacity == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(capacity, 8 * kPackThreads);
  SWAT_LAUNCH(zero_tail<T>, blocks < 1024 ? blocks : 1024, kPackThreads, 0, stream, values, kept, capacity);
  return cudaGetLastError();
}

#define SWAT_INSTANTIATE(T)                                                                         \
  template size_t compress_scratch(const CompressParams<T>&);                                       \
  template cudaError_t compress(const CompressParams<T>&, cudaStream_t);                            \
  template cudaError_t outside(const int64_t*, int64_t, int64_t, const T*, int32_t*, cudaStream_t); \
  template cudaError_t clear_tail(T*, const int64_t*, int64_t, cudaStream_t);
SWAT_INSTANTIATE(float)
SWAT_INSTANTIATE(double)
SWAT_INSTANTIATE(BFloat16)
SWAT_INSTANTIATE(Half)
#undef SWAT_INSTANTIATE

}  // namespace swat::cuda
