// What kernels need of the compiler, so that the same source runs on a GPU and, thread by thread, on a CPU in tests/emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../host_device.h"

#ifdef SWAT_EMULATE_CUDA
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
// kernel is a name in parentheses where it has template arguments.
#define SWAT_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SWAT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define SWAT_SHARED(name, type) __shared__ std::type_identity_t<type> name  // type may be an array
#define SWAT_GIVE_WAY()                                                     // threads of a GPU need no turn to go on
#endif

namespace swat::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <typename A, typename B>
SWAT_HOST_DEVICE constexpr int64_t ceil_div(A a, B b) {
  return (static_cast<int64_t>(a) + b - 1) / b;
}

// a / b of numbers that are not negative: 64-bit division is a routine of some hundred instructions on a GPU.
SWAT_HOST_DEVICE inline int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// `value`, but the compiler does not know it: what depends on it is computed anew here, not kept in registers until here.
SWAT_HOST_DEVICE inline int recomputed(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Return the error of a call, or of the launch before it, from the launcher around it.
#define SWAT_TRY(call)                                \
  do {                                                \
    const cudaError_t swat_error = (call);            \
    if (swat_error != cudaSuccess) return swat_error; \
  } while (0)

// Kernels of a second selection run only where the first let too much pass; a null condition means always.
SWAT_HOST_DEVICE inline bool skipped(const int32_t* condition) { return condition != nullptr && *condition == 0; }

}  // namespace swat::cuda
