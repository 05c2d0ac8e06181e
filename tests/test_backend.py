"""backend="auto": a rule over the layer and a table; tune_ measures."""

import json
import subprocess
import sys
from importlib import resources

import pytest
import torch
from networks import assert_same_state, batches, sgd, sparse_layers, sparse_network, train
from torch import nn

import swat_ext
from swat_ext import _C, SWATConv2d, SWATLinear
from swat_ext.ops import backend
from swat_ext.ops.backend import choose_backend, kind_of

TABLE = {
    "spatial": [[15, 2.0], [10**9, 0.6]],
    "1x1": [[10**9, 0.7]],
    "grouped": [[1, 2.0], [10**9, 0.5]],
    "linear": [[10**9, 0.8]],
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_table", lambda: dict.fromkeys(_C.supported_isas(), TABLE))


@pytest.mark.parametrize(
    ("size", "groups", "sparsity", "wanted", "reason"),
    [
        ([64, 64, 3, 3], 1, 0.9, "sparse", "skips 90% of the work, and spatial layers gain from 60%"),
        ([64, 64, 3, 3], 1, 0.5, "dense", "skips 50% of the work, and spatial layers gain from 60%"),
        ([8, 64, 3, 3], 1, 0.95, "dense", "spatial layers of this size do not gain"),
        ([64, 64, 1, 1], 1, 0.7, "sparse", "1x1 layers gain from 70%"),
        ([64, 1, 3, 3], 64, 0.95, "dense", "grouped layers of this size do not gain"),
        ([64, 2, 3, 3], 32, 0.5, "sparse", "grouped layers gain from 50%"),
        ([10, 512], 1, 0.75, "dense", "linear layers gain from 80%"),
    ],
)
def test_auto_follows_the_table(
    table: None, size: list[int], groups: int, sparsity: float, wanted: str, reason: str
) -> None:
    choice = choose_backend("auto", size, groups, sparsity, sparsity, "cpu")
    assert choice.backend == wanted
    assert reason in choice.reason
    for asked in ("sparse", "dense"):
        assert choose_backend(asked, size, groups, sparsity, sparsity, "cpu") == (asked, "asked for")


def test_the_share_of_skipped_work_counts_two_passes_of_weights_and_one_of_activations(table: None) -> None:
    assert "skips 60%" in choose_backend("auto", [64, 64, 3, 3], 1, 0.9, 0.0, "cpu").reason
    assert "skips 30%" in choose_backend("auto", [64, 64, 3, 3], 1, 0.0, 0.9, "cpu").reason


def test_the_table_of_the_library_is_whole() -> None:
    found = json.loads(resources.files("swat_ext.ops").joinpath("break_even.json").read_text())["break_even"]
    assert set(found) >= {"portable", "avx2", "avx512"}
    for kinds in found.values():
        samples = (([8, 8], 1), ([8, 8, 1, 1], 1), ([8, 8, 3, 3], 1), ([8, 1, 3, 3], 8))
        assert set(kinds) == {kind_of(size, groups) for size, groups in samples}
        for rows in kinds.values():
            limits = [most for most, _ in rows]
            assert limits == sorted(limits)
            assert limits[-1] >= 10**6
            assert all(0 < share <= 2 for _, share in rows)


def test_the_choice_is_the_same_in_every_process() -> None:
    code = """
import torch, swat_ext
from networks import sparse_network, sparse_layers
print([tuple(layer.chosen_backend) for layer in sparse_layers(sparse_network(backend="auto"))])
"""
    path = f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r})\n"
    outputs = {subprocess.check_output([sys.executable, "-c", path + code], text=True) for _ in range(2)}
    here = str([tuple(layer.chosen_backend) for layer in sparse_layers(sparse_network(backend="auto"))]) + "\n"
    assert outputs == {here}


def test_tuning_changes_the_backends_alone() -> None:
    model, untouched = sparse_network(), sparse_network()
    optimizer, other = sgd(model), sgd(untouched)
    train(model, optimizer, batches(2))
    train(untouched, other, batches(2))
    calls: list[int] = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    tuning = swat_ext.tune_(model, batches(1)[0][0], rounds=1)
    assert calls == []
    assert [row.name for row in tuning.layers] == ["3", "5", "7", "9"]
    for row, layer in zip(tuning.layers, sparse_layers(model), strict=True):
        assert layer.backend == row.backend == ("sparse" if row.sparse <= row.dense else "dense")
        assert layer.chosen_backend == (row.backend, "asked for")
        assert row.speedup == pytest.approx(row.pytorch / min(row.sparse, row.dense))
    assert "PyTorch, ms" in str(tuning)
    for layer in sparse_layers(untouched):
        layer.backend = "sparse"
    for layer in sparse_layers(model):
        layer.backend = "sparse"
    train(model, optimizer, batches(4, first=2))
    train(untouched, other, batches(4, first=2))
    assert_same_state(model, untouched)


def test_a_layer_that_is_called_twice_is_timed_over_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = SWATConv2d(4, 4, 3, padding=1, sparsity=0.5)
            self.unused = SWATLinear(4, 4, sparsity=0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    (row,) = swat_ext.tune_(Twice(), torch.randn(2, 4, 6, 6), rounds=1).layers
    assert row.name == "conv"
    assert min(row.sparse, row.dense, row.pytorch) > 0


def test_tuning_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"^model: expected at least one"):
        swat_ext.tune_(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got dict"):
        swat_ext.tune_({})
    with pytest.raises(ValueError, match=r"^rounds: expected at least 1, got 0"):
        swat_ext.tune_(sparse_network(), batches(1)[0][0], rounds=0)


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert swat_ext.__version__ == version("swat_ext")
