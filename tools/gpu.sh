#!/usr/bin/env bash
# Everything that needs a GPU, in one go of under ten minutes: build, tests, compute-sanitizer, benches. Run by `make gpu`.
# Needs a torch with CUDA, nvcc, setuptools and pytest in PYTHON; installs nothing. Results go to bench/results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD SWAT_CUDA=1 PYTHONUNBUFFERED=1

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'
home=$("$python" tools/cuda_home.py)
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST
fi

echo "== build"
"$python" setup.py -q build_ext --inplace
"$python" -c 'from swat_ext import _C; assert _C.build_info()["cuda"], "built without CUDA"'

failed=0
echo "== tests"
tests=(tests/test_cuda.py tests/test_cuda_kernels.py tests/test_autocast.py tests/test_functional_conv2d.py)
"$python" -c 'import hypothesis' 2>/dev/null && tests+=(tests/test_ops_compress.py tests/test_ops_magnitude.py)
timeout 180 "$python" -m pytest -q -k "cuda" "${tests[@]}" || failed=1

echo "== compute-sanitizer"
sanitizer=$home/bin/compute-sanitizer
command -v "$sanitizer" >/dev/null || sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck; do
    # initcheck would also complain of PyTorch's own; ours reads nothing that it has not written.
    timeout 60 "$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-regex kns=swat \
      "$python" tools/sanitize_cuda.py || { echo "compute-sanitizer $tool: failed"; failed=1; }
  done
else
  echo "compute-sanitizer is not installed: skipped"
fi

echo "== benches"
timeout 240 "$python" bench/gpu.py "$@" || failed=1
exit $failed
