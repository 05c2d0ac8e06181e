#pragma once

#include "kernels/cpu/table.h"

namespace swat::cpu {

extern const KernelTable wide_table;

}  // namespace swat::cpu
