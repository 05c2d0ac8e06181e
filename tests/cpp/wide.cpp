// The kernels with 64-byte vectors but no wide instructions: the AVX-512 bodies, as far as they are not intrinsics, on any machine.
#include "wide.h"

#include "kernels/cpu/headers.h"

#define SWAT_VECTOR_BYTES 64
#define SWAT_REGISTERS 32
#define SWAT_INTRINSICS 0

namespace swat::cpu {
namespace wide {
#include "kernels/cpu/kernels.inl"
}  // namespace wide

const KernelTable wide_table = wide::table_of();

}  // namespace swat::cpu
