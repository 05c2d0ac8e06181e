"""Where the CUDA toolkit is: CUDA_HOME or CUDA_PATH, or else what the nvcc on the PATH says of itself.

Not the folder above that nvcc: it may be a link or a script elsewhere. As a program it prints the folder, or fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def find_cuda_home() -> str | None:
    """The toolkit's folder, or None where there is no nvcc."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return named if (Path(named) / "bin" / "nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        command = [nvcc, "-dryrun", "-c", str(source), "-o", str(Path(folder, "empty.o"))]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ _HERE_=(.*)$", said, re.MULTILINE)
    home = Path(found[1]).parent if found else Path(nvcc).resolve().parent.parent
    return str(home) if (home / "bin" / "nvcc").exists() else None


if __name__ == "__main__":
    home = find_cuda_home()
    if home is None:
        sys.exit("no CUDA toolkit: nvcc is not on the PATH, and neither CUDA_HOME nor CUDA_PATH names one")
    print(home)
