"""The one list of C++ sources, by paths relative to this folder; setup.py and CMakeLists.txt both read it."""

# Kernels that know neither torch nor Python.
CPU_KERNELS = [
    "kernels/cpu/batch_norm.cpp",
    "kernels/cpu/bias_grad.cpp",
    "kernels/cpu/convolution.cpp",
    "kernels/cpu/depthwise_gradient.cpp",
    "kernels/cpu/dispatch.cpp",
    "kernels/cpu/gather_plan.cpp",
    "kernels/cpu/max_pool.cpp",
    "kernels/cpu/packing.cpp",
    "kernels/cpu/relu.cpp",
    "kernels/cpu/weight_grad_plan.cpp",
    "kernels/cpu/weight_gradient.cpp",
    "kernels/cpu/portable.cpp",
    "kernels/cpu/avx2.cpp",
    "kernels/cpu/avx512.cpp",
    "kernels/cpu/avx512vl.cpp",
]

# Operators over those kernels, on torch's stable ABI.
OPS = [
    "ops/schemas.cpp",
    "ops/cpu.cpp",
    "ops/cpu_layers.cpp",
]

# The Python module swat_ext._C.
RUNTIME = ["runtime.cpp"]

# CUDA kernels, and the operators over them; the kernels are torch-free and need nvcc, the operators only its headers.
CUDA_KERNELS = [
    "kernels/cuda/batch_norm.cu",
    "kernels/cuda/batch_norm_grad.cu",
    "kernels/cuda/compress.cu",
    "kernels/cuda/compress_planes.cu",
    "kernels/cuda/convolution.cu",
    "kernels/cuda/decompress.cu",
    "kernels/cuda/magnitude.cu",
    "kernels/cuda/max_pool.cu",
    "kernels/cuda/relu.cu",
]
CUDA_OPS = ["ops/cuda.cpp", "ops/cuda_layers.cpp"]

# How nvcc compiles each kernel. No fast mathematics: a denormal or a NaN means the same as on the CPU.
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fvisibility=hidden"]

# How each of them is compiled, whichever build does it. No instruction set here: the kernels choose theirs when loaded.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wno-psabi",
]
