// The name that operators are registered under: torch.ops.swat_ext, or another where a test builds them a second time.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef SWAT_LIBRARY_NAME
#define SWAT_LIBRARY_NAME swat_ext
#endif

// Torch's macros paste their arguments before expanding them.
#define SWAT_EXPAND_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define SWAT_EXPAND_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#define SWAT_LIBRARY(m) SWAT_EXPAND_LIBRARY(SWAT_LIBRARY_NAME, m)
#define SWAT_LIBRARY_IMPL(key, m) SWAT_EXPAND_LIBRARY_IMPL(SWAT_LIBRARY_NAME, key, m)
