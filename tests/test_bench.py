"""The benchmarks run, on something small, and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import swat_ext

BENCH = Path(__file__).parents[1] / "bench"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """bench/layers.py, on the swat_ext that is tested here."""
    paths = [str(Path(swat_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(BENCH / "layers.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_layers(tmp_path: Path) -> None:
    out = tmp_path / "new" / "layers.json"
    done = _run("--batch", "1", "--rounds", "1", "--sparsity", "90", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"cpu", "isa", "threads", "torch"} <= result["conditions"].keys()
    assert [layer["channels"] for layer in result["layers"]] == [64, 128, 256, 512]
    assert all(timing["median_ms"] > 0 for layer in result["layers"] for timing in layer["timings"].values())
    assert len(result["totals"]) == 1
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_wrong_sparsity_is_explained() -> None:
    done = _run("--sparsity", "0.9")
    assert done.returncode == 2
    assert "whole percentages in [0, 100)" in done.stderr
    assert "'0.9'" in done.stderr
