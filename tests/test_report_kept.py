"""report: what each layer keeps, its share of the whole, and FLOPs, computed by hand."""

import json
from typing import Any

import pytest
import torch
from networks import batches, sgd, sparse_network, train
from torch import nn

from swat_ext import SWATConfig, SWATLayer, SWATScheduler, report, sparsify_
from swat_ext.topology import RigL

SIZE = (2, 3, 4, 4)
# Of the three layers below.
WEIGHTS, SIDES = (216, 720, 800), (17, 24, 165)
MACS = (2 * 8 * 16 * 27, 2 * 10 * 16 * 72, 2 * 5 * 160)


def network(**config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, padding=1), nn.Flatten(), nn.Linear(160, 5)
    )
    sparsify_(model, SWATConfig(**{"sparsity": 0.5, **config}))
    return model


def table(text: str) -> dict[str, list[str]]:
    """Cells of the row of each layer; two spaces or more stand between them."""
    lines = [line for line in text.split("\n\n")[1].splitlines() if not line.startswith("-")]
    return {cells[0]: cells for line in lines if (cells := [cell.strip() for cell in line.split("  ") if cell.strip()])}


def test_erk_by_hand() -> None:
    """eps = 868 / 206: 4.2136 * 17 = 71.6, 4.2136 * 24 = 101.1, 4.2136 * 165 = 695.2, each rounded up."""
    found = report(network(distribution="erk"), SIZE)
    kept = (72, 102, 696)
    assert [row.weights for row in found.layers] == list(WEIGHTS)
    assert [row.kept_weights for row in found.layers] == list(kept)
    assert (found.weights, found.kept_weights) == (1736, 870)
    assert found.sparsity == 1 - 870 / 1736
    for row, macs, count, weights in zip(found.layers, MACS, kept, WEIGHTS, strict=True):
        assert row.dense_flops == 6 * macs
        assert row.sparsity == row.activation_sparsity == pytest.approx(1 - count / weights)
        # Two passes with the kept weights, one with as large a share of the inputs.
        assert row.swat_flops == pytest.approx(6 * macs * count / weights)
    assert found.dense_flops == 189312
    assert found.swat_flops == pytest.approx(13824 + 19584 + 8352)
    rows = table(str(found))
    assert rows["layer"][2:4] == ["sparsity", "kept"]
    assert [rows[name][3] for name in ("0", "1", "3")] == ["72 (8.3%)", "102 (11.7%)", "696 (80%)"]
    assert rows["total"][1:3] == ["49.9%", "870"]
    assert json.loads(json.dumps(found.to_dict()))["kept_weights"] == 870


def test_activations_apart_by_hand() -> None:
    found = report(network(distribution="erk", activation_sparsity=0.75), SIZE)
    for row, macs, count, weights in zip(found.layers, MACS, (72, 102, 696), WEIGHTS, strict=True):
        assert row.swat_flops == pytest.approx(2 * macs * (2 * count / weights + 0.25))


def test_uniform_with_a_dense_layer_by_hand() -> None:
    found = report(network(sparsity=0.9), SIZE)
    assert [row.kept_weights for row in found.layers] == [216, 72, 80]
    assert found.kept_weights == 368
    assert found.swat_flops == pytest.approx(6 * (MACS[0] + 0.1 * MACS[1] + 0.1 * MACS[2]))
    rows = table(str(found))
    assert rows["0"][2] == "-"
    assert rows["total"][1] == "78.8%"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        # At 0.85: 4 of 24 kernels, 12 of 80, and 120 of 800 weights.
        ({"granularity": "kernel"}, [4 * 9, 12 * 9, 120]),
        # 2 of 8 filters, 2 of 10.
        ({"granularity": "filter"}, [2 * 27, 2 * 72, 120]),
        # 5 of 27, 22 of 144, 24 of 160 blocks of 8: that a row's last has 2 or 5 outputs is not known beforehand.
        ({"granularity": "block"}, [5 * 8, 22 * 8, 24 * 5]),
    ],
)
def test_blocks_by_hand(options: dict[str, Any], kept: list[int]) -> None:
    found = report(network(sparsity=0.85, skip=(), **options), SIZE)
    assert [row.kept_weights for row in found.layers] == kept
    assert found.kept_weights == sum(kept)


def test_what_a_pattern_keeps_is_counted() -> None:
    model = network(sparsity=0.85, skip=(), method="static", granularity="block")
    found = report(model, SIZE)
    for row, layer in zip(found.layers, (model[0], model[1], model[3]), strict=True):
        assert isinstance(layer, SWATLayer)
        assert row.kept_weights == int((layer.weight != 0).sum())
        assert row.realised_sparsity[0] == 1 - row.kept_weights / row.weights
        assert row.steps_since_selection == (None, None)


def test_shares_follow_the_momenta() -> None:
    model = sparse_network(distribution="momentum")
    optimizer = sgd(model)
    SWATScheduler(model, optimizer)
    train(model, optimizer, batches(3))
    found = report(model)
    layers = [module for module in model.modules() if isinstance(module, SWATLayer)]
    budget = found.weights / 5
    assert budget <= found.kept_weights < budget + 5
    for row, layer in zip(found.layers, layers, strict=True):
        assert row.kept_weights == int((layer.to_dense().weight != 0).sum())
    assert len({row.sparsity for row in found.layers}) == 5
    assert "kept" in table(str(found))["layer"]


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3))
    model[1].weight = model[0].weight
    sparsify_(model, SWATConfig(0.8))
    found = report(model, (4, 10))
    assert [row.kept_weights for row in found.layers] == [20, 20, 6]
    assert (found.weights, found.kept_weights) == (130, 26)
    assert found.swat_flops == pytest.approx(6 * 4 * 230 * 0.2)


def test_asking_changes_nothing() -> None:
    model = sparse_network(method=RigL(update_period=1))
    optimizer = sgd(model)
    SWATScheduler(model, optimizer, total_steps=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report(model, (4, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train(model, optimizer, batches(2))  # still driven
