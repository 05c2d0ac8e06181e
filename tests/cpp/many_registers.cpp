// The kernels with 32-byte vectors and the tiles of 32 registers: those of AVX-512VL, as far as they are not intrinsics, on any machine.
#include "wide.h"

#include "kernels/cpu/headers.h"

#define SWAT_VECTOR_BYTES 32
#define SWAT_REGISTERS 32
#define SWAT_INTRINSICS 0

namespace swat::cpu {
namespace many_registers {
#include "kernels/cpu/kernels.inl"
}  // namespace many_registers

const KernelTable many_registers_table = many_registers::table_of();

}  // namespace swat::cpu
