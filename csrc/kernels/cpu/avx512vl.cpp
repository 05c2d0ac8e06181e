// The kernels for AVX-512 with 32-byte vectors: those of AVX2 with twice the registers. Processors that add up 64-byte vectors in two
// halves, as Zen 4 does, are faster with them.
#include "headers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SWAT_VECTOR_BYTES 32
#define SWAT_REGISTERS 32
#define SWAT_INTRINSICS 256

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=256")
namespace swat::cpu {
namespace avx512vl {
#include "kernels.inl"
}  // namespace avx512vl
}  // namespace swat::cpu
#pragma GCC pop_options

namespace swat::cpu {
const KernelTable avx512vl_table = avx512vl::table_of();
}  // namespace swat::cpu
#endif
