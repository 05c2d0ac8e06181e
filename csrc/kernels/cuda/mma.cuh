// Tensor core products of one warp, c[16 x 8] += a[16 x k] * b[k x 8], by the fragment layouts of PTX's mma.sync.m16n8:
//   with g = lane / 4, t = lane % 4, c[i] is at row g + 8 * (i / 2), column 2 * t + i % 2;
//   k = 16, two 16-bit numbers a register: a[i] holds row g + 8 * (i % 2), columns 2 * t + 8 * (i / 2) and the next,
//                                          b[i] holds rows 2 * t + 8 * i and the next, column g;
//   k = 8, tf32: a[i] is at row g + 8 * (i % 2), column t + 4 * (i / 2); b[i] is at row t + 4 * i, column g.
#pragma once

#include "types.h"
#include "warp.cuh"

namespace swat::cuda {

#ifdef SWAT_EMULATE_CUDA

// `width` numbers a register; value(bits, i) is the i-th.
template <typename Value>
inline void emulate_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int width, Value value) {
  uint32_t all_a[4][kWarp], all_b[2][kWarp];
  for (int i = 0; i < 4; ++i) {
    const uint64_t* lanes = cuda_emulator::exchange(a[i]);
    for (int lane = 0; lane < kWarp; ++lane) all_a[i][lane] = static_cast<uint32_t>(lanes[lane]);
  }
  for (int i = 0; i < 2; ++i) {
    const uint64_t* lanes = cuda_emulator::exchange(b[i]);
    for (int lane = 0; lane < kWarp; ++lane) all_b[i][lane] = static_cast<uint32_t>(lanes[lane]);
  }
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8 * width; ++k) {
      const int quad = k / width % 4, half = k / width / 4;
      sum += static_cast<double>(value(all_a[row / 8 + 2 * half][row % 8 * 4 + quad], k % width)) *
             value(all_b[half][column * 4 + quad], k % width);
    }
    c[i] = static_cast<float>(sum);
  }
}
template <typename T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma(c, a, b, sizeof(T) == 4 ? 1 : 2, [](uint32_t bits, int i) {
    if constexpr (sizeof(T) == 4) {
      return bit_copy<float>(bits);
    } else {
      return load(T{static_cast<uint16_t>(bits >> (16 * i))});
    }
  });
}
inline float round_to_tf32(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? value : bit_copy<float>((bits + 0x1000u) & 0xffffe000u);
}

#else

template <typename T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define SWAT_MMA(T, shape)                                                                                    \
  template <>                                                                                                 \
  __device__ inline void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {              \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
  }
SWAT_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SWAT_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
SWAT_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SWAT_MMA
__device__ inline float round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bit_copy<float>(bits);
}

#endif

}  // namespace swat::cuda
