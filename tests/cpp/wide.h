#pragma once

#include "kernels/cpu/table.h"

namespace swat::cpu {

extern const KernelTable wide_table;            // 64-byte vectors
extern const KernelTable many_registers_table;  // 32-byte vectors, 32 registers

}  // namespace swat::cpu
