// The kernels for AVX2 and FMA.
#include "headers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SWAT_VECTOR_BYTES 32
#define SWAT_REGISTERS 16
#define SWAT_INTRINSICS 256

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,lzcnt,popcnt")
namespace swat::cpu {
namespace avx2 {
#include "kernels.inl"
}  // namespace avx2
}  // namespace swat::cpu
#pragma GCC pop_options

namespace swat::cpu {
const KernelTable avx2_table = avx2::table_of();
}  // namespace swat::cpu
#endif
