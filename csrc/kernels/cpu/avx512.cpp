// The kernels for AVX-512.
#include "headers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SWAT_VECTOR_BYTES 64
#define SWAT_REGISTERS 32
#define SWAT_INTRINSICS 512

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")
namespace swat::cpu {
namespace avx512 {
#include "kernels.inl"
}  // namespace avx512
}  // namespace swat::cpu
#pragma GCC pop_options

namespace swat::cpu {
const KernelTable avx512_table = avx512::table_of();
}  // namespace swat::cpu
#endif
