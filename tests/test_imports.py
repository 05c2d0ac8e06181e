"""What importing swat_ext brings in, and in which order its modules need each other."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import swat_ext

PACKAGE = Path(swat_ext.__file__).parent
# What only some data sets, the demo's picture or a progress bar need.
EXTRAS = ("matplotlib", "mlxtend", "PIL", "skimage", "sklearn", "tqdm")


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_extras_are_imported_where_they_are_needed_alone() -> None:
    names = sorted(_modules())
    code = (
        "import importlib, sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print([name for name in {EXTRAS} if name in sys.modules and name not in before])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = _modules()
    needs: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                needs[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                # "from a import b" needs a.b where that is a module, and a otherwise.
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                needs[name] |= {found if found in modules else node.module for found in inner}
    # "from swat_ext import _C" is the extension, no module in Python.
    graph = {name: found & modules.keys() - {name, "swat_ext"} for name, found in needs.items()}
    assert len(graph) > 40
    assert graph["swat_ext.demo"] >= {"swat_ext.training.comparison", "swat_ext.training.figure"}
    list(graphlib.TopologicalSorter(graph).static_order())
