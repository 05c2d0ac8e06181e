// Storage types of the kernels, and the type that each is computed in.
#pragma once

#include "platform.h"

#include <cstring>

#ifndef SWAT_EMULATE_CUDA
#include <cuda_fp16.h>
#endif

namespace swat::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Bits of a value, and what sums of products of it are held in.
template <typename T>
struct Traits;
template <>
struct Traits<float> {
  using Bits = uint32_t;
  using Compute = float;
};
template <>
struct Traits<double> {
  using Bits = uint64_t;
  using Compute = double;
};
template <>
struct Traits<BFloat16> {
  using Bits = uint16_t;
  using Compute = float;
};
template <>
struct Traits<Half> {
  using Bits = uint16_t;
  using Compute = float;
};
template <typename T>
using Compute = typename Traits<T>::Compute;

template <typename To, typename From>
SWAT_HOST_DEVICE inline To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

SWAT_HOST_DEVICE inline float load(float value) { return value; }
SWAT_HOST_DEVICE inline double load(double value) { return value; }
SWAT_HOST_DEVICE inline float load(BFloat16 value) { return bit_copy<float>(static_cast<uint32_t>(value.bits) << 16); }
SWAT_HOST_DEVICE inline float load(Half value) {
#ifdef SWAT_EMULATE_CUDA
  return static_cast<float>(bit_copy<_Float16>(value.bits));
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

// Round to nearest, ties to even.
template <typename T>
SWAT_HOST_DEVICE inline T store(Compute<T> value);
template <>
SWAT_HOST_DEVICE inline float store<float>(float value) {
  return value;
}
template <>
SWAT_HOST_DEVICE inline double store<double>(double value) {
  return value;
}
template <>
SWAT_HOST_DEVICE inline BFloat16 store<BFloat16>(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  // A NaN whose payload lies in the low half would round to infinity.
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
SWAT_HOST_DEVICE inline Half store<Half>(float value) {
#ifdef SWAT_EMULATE_CUDA
  return {bit_copy<uint16_t>(static_cast<_Float16>(value))};
#else
  return {__half_as_ushort(__float2half_rn(value))};
#endif
}

// Bits of |value|: integers in the order of the magnitudes, NaN above infinity.
template <typename T>
SWAT_HOST_DEVICE inline uint64_t magnitude_bits(T value) {
  using Bits = typename Traits<T>::Bits;
  return bit_copy<Bits>(value) & static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
}
template <typename T>
SWAT_HOST_DEVICE inline T from_bits(uint64_t bits) {
  return bit_copy<T>(static_cast<typename Traits<T>::Bits>(bits));
}

// Whether a selection keeps `value`: not below the threshold, and not zero. NaN is below nothing.
template <typename T>
SWAT_HOST_DEVICE inline bool keeps(T value, Compute<T> threshold) {
  const Compute<T> v = load(value);
  return !((v < 0 ? -v : v) < threshold) && v != 0;
}

}  // namespace swat::cuda
