// Runs CUDA kernels on a CPU, for tests where no GPU is at hand: one block after the other, each thread of it a coroutine.
//
// Threads give way at __syncthreads, at warp-wide instructions and where they wait for another block's word (SWAT_GIVE_WAY) alone,
// in an order that a seed shuffles, so that a kernel that leans on an order, or that misses a barrier between one thread's write
// and another's read, is likely to be seen. Shared memory starts as NaN in every type of ours, which as an integer is a large number;
// a block that takes more than 48 KiB of it aborts, and so does a barrier that not every thread reaches. What cannot be seen: memory
// order between blocks that run at the same time, and speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1)
      : x(static_cast<unsigned>(x)), y(static_cast<unsigned>(y)), z(static_cast<unsigned>(z)) {}
};

namespace cuda_emulator {

extern dim3 thread_index, block_index, block_size, grid_size;

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
unsigned char* dynamic_shared();
// A variable that the threads of a block share. `key` is of its declaration: the first thread to come there takes the memory.
void* static_shared(const void* key, size_t bytes);
void block_barrier();
// A barrier that tells whether the predicate holds for any thread.
bool block_any(bool predicate);
void give_way();
// Gives every lane of the warp what each of them passed; valid until the lane's next exchange.
const uint64_t* exchange(uint64_t value);
int lane();

template <typename V>
uint64_t pack(V value) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  return bits;
}
template <typename V>
V unpack(uint64_t bits) {
  V value;
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

}  // namespace cuda_emulator

#define threadIdx (cuda_emulator::thread_index)
#define blockIdx (cuda_emulator::block_index)
#define blockDim (cuda_emulator::block_size)
#define gridDim (cuda_emulator::grid_size)

#define SWAT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), cuda_emulator::launch(dim3(grid), dim3(block), shared, [=] { kernel(__VA_ARGS__); }))
#define SWAT_DYNAMIC_SHARED(name) unsigned char* const name = cuda_emulator::dynamic_shared()
#define SWAT_SHARED(name, type)                           \
  static char name##_key;                                 \
  auto& name = *static_cast<std::type_identity_t<type>*>( \
      cuda_emulator::static_shared(&name##_key, sizeof(std::type_identity_t<type>)))
#define SWAT_GIVE_WAY() cuda_emulator::give_way()

inline void __syncthreads() { cuda_emulator::block_barrier(); }
inline int __syncthreads_or(int predicate) { return cuda_emulator::block_any(predicate != 0); }
inline void __syncwarp() { cuda_emulator::exchange(0); }
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* all = cuda_emulator::exchange(predicate);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all[i] & 1) << i;
  return bits;
}
template <typename V>
V __shfl_sync(unsigned, V value, int source) {
  return cuda_emulator::unpack<V>(cuda_emulator::exchange(cuda_emulator::pack(value))[source & 31]);
}
template <typename V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  const int source = cuda_emulator::lane() ^ mask;
  return cuda_emulator::unpack<V>(cuda_emulator::exchange(cuda_emulator::pack(value))[source]);
}
template <typename V>
V __shfl_up_sync(unsigned, V value, int delta) {
  const int source = cuda_emulator::lane() - delta;
  const uint64_t* all = cuda_emulator::exchange(cuda_emulator::pack(value));
  return source < 0 ? value : cuda_emulator::unpack<V>(all[source]);
}
template <typename V>
V __ldg(const V* pointer) {
  return *pointer;
}
inline uint32_t atomicAdd(uint32_t* target, uint32_t value) {
  const uint32_t before = *target;
  *target += value;
  return before;
}
inline uint32_t atomicOr(uint32_t* target, uint32_t value) {
  const uint32_t before = *target;
  *target |= value;
  return before;
}

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
