// Everything that the kernel bodies use from outside. It comes before any target region: a library function compiled for a wide
// instruction set could otherwise be the copy that the linker keeps for all.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#include "buffer.h"
#include "dispatch.h"
#include "layer_params.h"
#include "params.h"
#include "table.h"
