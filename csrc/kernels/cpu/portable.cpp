// The kernels for any processor: 16-byte vectors, whatever the compiler makes of them.
#include "headers.h"

#define SWAT_VECTOR_BYTES 16
#define SWAT_REGISTERS 16
#define SWAT_INTRINSICS 0

namespace swat::cpu {
namespace portable {
#include "kernels.inl"
}  // namespace portable

const KernelTable portable_table = portable::table_of();

}  // namespace swat::cpu
