// Marks what nvcc also compiles for the GPU; nothing to any other compiler.
#pragma once

#ifdef __CUDACC__
#define SWAT_HOST_DEVICE __host__ __device__
#else
#define SWAT_HOST_DEVICE
#endif
