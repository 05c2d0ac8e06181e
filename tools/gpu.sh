#!/usr/bin/env bash
# Everything that needs a GPU, in one go of under ten minutes: build, tests, compute-sanitizer, benches. Run by `make gpu`.
# Needs a torch with CUDA, nvcc, setuptools, pytest and tqdm in PYTHON; installs nothing. Results go to bench/results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD SWAT_CUDA=1 PYTHONUNBUFFERED=1

limit=570  # seconds, of all
failed=0
# Run a command for so many seconds at most, or what is left of all; go on if it fails.
try() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name, $((limit - SECONDS)) s are left"
  ((seconds < limit - SECONDS)) || seconds=$((limit - SECONDS))
  if ((seconds <= 0)) || ! timeout "$seconds" "$@"; then
    echo "$name: failed, or not done in time"
    failed=1
  fi
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'
home=$("$python" tools/cuda_home.py)
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST
fi

echo "== build"
"$python" setup.py -q build_ext --inplace
"$python" -c 'from swat_ext import _C; assert _C.build_info()["cuda"], "built without CUDA"'

# What is marked for a GPU, wherever it stands; files without such tests may import what this machine lacks.
mapfile -t files < <(grep -lE 'needs_cuda|: Kernels|device: torch\.device' tests/test_*.py)
"$python" -c 'import hypothesis' 2>/dev/null || mapfile -t files < <(grep -LE '(import|from) hypothesis' "${files[@]}")
try tests 200 "$python" -m pytest -q -m cuda "${files[@]}"

sanitizer=$home/bin/compute-sanitizer
command -v "$sanitizer" >/dev/null || sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck; do
    # PyTorch's own kernels are left out: initcheck would complain of them.
    try "compute-sanitizer $tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-regex kns=swat \
      "$python" tools/sanitize_cuda.py
  done
else
  echo "== compute-sanitizer is not installed: skipped"
fi

# No measurement begins in the last minute.
seconds=$((limit - SECONDS - 60))
try benches 600 "$python" bench/gpu.py --seconds "$((seconds > 0 ? seconds : 0))" "$@"
exit $failed
