"""report: the numbers, the text, and that it leaves the model alone."""

import dataclasses
import json
import math
import random

import pytest
import torch
from networks import batches, sgd, small_network, sparse_network, train
from torch import nn

import swat_ext
from swat_ext import SWATConfig, SWATConv2d, SWATLinear, report, sparsify_
from swat_ext.inspect.flops import layer_macs, packed_bytes, training_flops
from swat_ext.inspect.table import human_bytes, human_count, human_share, human_shares, render
from swat_ext.models import build_model

SIZE = (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2), (3, 6, 9, 8)),
        (nn.Conv1d(4, 6, 3), (2, 4, 9)),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (2, 6, 5, 4)),
        (nn.Linear(5, 7), (2, 3, 5)),
    ],
)
def test_multiplications_are_those_of_the_definition(layer, size):
    """An all-ones input and weight, without padding, add up one for each multiplication."""
    if hasattr(layer, "padding"):
        layer.padding = (0,) * len(layer.kernel_size)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.fill_(0)
        output = layer(torch.ones(size))
    assert layer_macs(layer, size, output.shape) == int(output.sum())


def test_training_flops_follow_the_definition():
    assert training_flops(100) == 600
    assert training_flops(100, 0.9, 0.5) == pytest.approx(2 * 100 * (0.1 + 0.1 + 0.5))


def test_rows_carry_the_settings_the_work_and_the_memory():
    model = sparse_network(activation_sparsity=0.5)
    found = report(model, SIZE)
    assert found.input_size == SIZE
    assert [row.name for row in found.layers] == ["0", "3", "5", "7", "9"]
    first, conv, strided, grouped, head = found.layers
    assert (first.sparse, first.sparsity, first.activation_sparsity) == (False, 0, 0)
    assert first.reason == "the first convolution (skip=None)"
    assert first.swat_flops == first.dense_flops == 6 * 4 * 16 * 64 * 27

    assert (conv.kind, conv.sparse, conv.calls) == ("Conv2d 3x3 16->16", True, 1)
    assert (conv.sparsity, conv.activation_sparsity) == (0.8, 0.5)
    assert (conv.backend, conv.reason) == model[3].chosen_backend
    assert conv.input_size == conv.output_size == (4, 16, 8, 8)
    macs = 4 * 16 * 64 * 16 * 9
    assert conv.dense_flops == 6 * macs
    assert conv.swat_flops == pytest.approx(2 * macs * (2 * 0.2 + 0.5))
    assert conv.dense_bytes == 4 * 16 * 64 * 4
    assert conv.activation_bytes == packed_bytes(4096, 2048, 4) == 2048 * 4 + (64 + 4) * 8
    assert conv.weight_bytes == (36 + 3) * 8  # the elements are in the parameter
    assert conv.saved_bytes == conv.activation_bytes + conv.weight_bytes

    assert strided.kind == "Conv2d 1x1 16->24, /2"
    assert grouped.kind == "Conv2d 3x3 24->24, 3 groups"
    assert head.kind == "Linear 384->5"
    assert found.dense_flops == sum(row.dense_flops for row in found.layers)
    assert found.swat_flops == pytest.approx(sum(row.swat_flops for row in found.layers))
    assert [layer.name for layer in found.left_dense] == ["0"]


def test_estimated_bytes_are_those_that_are_saved():
    """Without exact zeros and ties the estimate is exact."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    sparsify_(model, SWATConfig(0.8, skip=()))
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in parameters)
    assert report(model, SIZE).saved_bytes == held


def test_an_input_that_two_layers_read_counts_once_in_the_dense_total():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    model = Fork()
    sparsify_(model, SWATConfig(0.5))
    found = report(model, (32, 64))
    assert [row.dense_bytes for row in found.layers] == [32 * 64 * 4] * 2
    assert found.dense_bytes == 32 * 64 * 4
    assert found.saved_bytes == sum(row.saved_bytes for row in found.layers)


def test_a_shared_layer_counts_each_call():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sparsify_(model, SWATConfig(0.5))
    found = report(model, (2, 8))
    assert len(found.layers) == 1
    assert found.layers[0].calls == 2
    assert found.layers[0].dense_flops == 2 * 6 * 2 * 64
    assert "Linear 8->8 (2 calls)" in str(found)


def test_a_frozen_weight_holds_no_activation():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    sparsify_(model, SWATConfig(0.5, skip=()))
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
    conv, linear = report(model, SIZE).layers
    assert (conv.activation_bytes, linear.activation_bytes) == (0, 0)
    # PyTorch's convolution keeps its input even then, its linear layer does not.
    assert (conv.dense_bytes, linear.dense_bytes) == (4 * math.prod(SIZE), 0)


def test_a_dense_model_has_a_report_too():
    found = report(small_network(), SIZE)
    assert found.swat_flops == found.dense_flops
    assert found.saved_bytes == found.dense_bytes
    assert {layer.reason for layer in found.left_dense} == {"sparsify_ was not called on it"}


def test_without_a_size_there_are_no_flops_and_no_bytes():
    found = report(sparse_network())
    assert (found.dense_flops, found.swat_flops, found.dense_bytes, found.saved_bytes) == (None,) * 4
    assert {row.calls for row in found.layers} == {None}
    text = str(found)
    assert "Give input_size or example_inputs for FLOPs and bytes." in text
    assert "SWAT" not in text


def test_layers_that_are_not_swapped_are_listed_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    model.unused = nn.ModuleList([nn.MultiheadAttention(4, 2)])
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
    with pytest.warns(swat_ext.SparsifyWarning):
        sparsify_(model, SWATConfig(0.5, skip=["3"]))
    found = report(model)
    assert [(layer.name, layer.kind) for layer in found.left_dense] == [
        ("1", "ConvTranspose2d"),
        ("3", "Conv2d"),
        ("unused.0", "MultiheadAttention"),
        ("unused.0.out_proj", "NonDynamicallyQuantizableLinear"),
    ]
    text = str(found)
    assert "there is no sparse form of ConvTranspose2d; nn.Conv2d and nn.Linear have one: 1\n" in text
    assert "skip='3': 3\n" in text


def test_what_is_not_reached_and_not_counted_is_said():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head, self.unused = nn.MultiheadAttention(8, 2), nn.Linear(8, 2), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, x, x)[0])

    model = Attention()
    with pytest.warns(swat_ext.SparsifyWarning):
        sparsify_(model, SWATConfig(0.5))
    text = str(report(model, (5, 3, 8)))
    assert "Not counted, of a kind unknown here: attention." in text
    assert "Not called as a layer with such an input: attention.out_proj, unused." in text


def test_the_table_is_aligned_and_in_human_units():
    model = sparse_network()
    text = str(report(model, (64, 3, 8, 8)))
    table = text.split("\n\n")[1].splitlines()
    header, rule, *rows, second_rule, total = table
    assert rule == second_rule == "-" * len(rule)
    assert max(map(len, table)) == len(rule)
    column = header.index("FLOPs") + len("FLOPs")
    for row in (*rows, total):
        assert row[column - 1] in "kMG"
        assert row[column : column + 2] == "  "
    assert "56.6 M" in text  # 6 * 64 * 16 * 64 * 144 / 10, for layer 3 is 566 M dense
    why = model[3].chosen_backend
    assert f"  {why.backend}: {why.reason}: " in text
    assert "Sequential: 4 of 5 layers with weights train sparse; one training step on input 64x3x8x8" in text


def test_to_dict_is_json():
    found = report(sparse_network(), SIZE)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["model"] == "Sequential"
    assert again["layers"][1]["saved_bytes"] == found.layers[1].saved_bytes
    assert again["left_dense"] == [
        {"name": "0", "kind": "Conv2d", "reason": "the first convolution (skip=None)"},
    ]
    assert again["dense_flops"] == found.dense_flops


def test_it_leaves_the_model_alone():
    model, other = sparse_network(), sparse_network()
    first, second = sgd(model), sgd(other)
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append("forward"))
    model[3].register_forward_pre_hook(lambda *_: calls.append("before"))
    for number in range(5):
        train(model, first, batches(1, first=number))
        train(other, second, batches(1, first=number))
        if number == 3:
            model[1].eval(), other[1].eval()
        called, flags = len(calls), [module.training for module in model.modules()]
        torch.manual_seed(1)
        random.seed(1)
        report(model, SIZE)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(1))
        assert random.random() == random.Random(1).random()
        assert len(calls) == called
        assert [module.training for module in model.modules()] == flags
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


class ByValue(nn.Module):
    """Cannot run on shapes alone, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        x = self.norm(x)
        if x.sum().item() > 0:
            x = x + torch.rand(())
        return self.layer(x)


def test_a_model_that_needs_values_gets_them_and_is_left_alone_too():
    model = ByValue()
    sparsify_(model, SWATConfig(0.5))
    torch.manual_seed(1)
    found = report(model, (6, 8))
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(1))
    assert found.layers[0].dense_flops == 6 * 6 * 32
    assert model.runs == 0
    assert model.norm.num_batches_tracked == 0
    assert model.layer.steps == 0
    assert model.layer.weight_threshold == 0


def test_weight_norm_beside_sparse_layers_is_no_obstacle():
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(normed, nn.Linear(8, 4))
    with pytest.warns(swat_ext.SparsifyWarning):
        sparsify_(model, SWATConfig(0.5))
    assert report(model, (2, 8)).layers[0].dense_flops == 6 * 2 * 64


class Tokens(nn.Module):
    """Takes tokens and a mask, as language models do; ``by_value`` looks at them."""

    def __init__(self, by_value=False) -> None:
        super().__init__()
        self.embed, self.head, self.by_value = nn.Embedding(10, 8), nn.Linear(8, 10), by_value

    def forward(self, tokens, mask=None, options=None):
        if self.by_value:
            assert tokens.max().item() == 9
        assert options is None or options["scale"][0] == 2
        x = self.embed(tokens)
        return self.head(x if mask is None else x * mask.unsqueeze(-1))


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_example_inputs_are_tokens_and_several_arguments(form, by_value):
    model = Tokens(by_value)
    sparsify_(model, SWATConfig(0.5))
    tokens, mask = torch.arange(10).reshape(2, 5), torch.ones(2, 5)
    before = tokens.clone()
    forms = {
        "tensor": tokens,
        "tuple": (tokens, mask, {"scale": [2]}),
        "dict": {"mask": mask, "tokens": tokens, "options": None},
    }
    with torch.inference_mode():
        found = report(model, example_inputs=forms[form])
    (row,) = found.layers
    assert (row.input_size, row.output_size, row.calls) == ((2, 5, 8), (2, 5, 10), 1)
    assert row.dense_flops == 6 * 10 * 8 * 10
    assert row.dense_bytes == found.dense_bytes == 10 * 8 * 4
    assert found.input_size == (2, 5)
    assert torch.equal(tokens, before)
    assert "one training step on input 2x5" in str(found)
    if form == "tensor" and not by_value:
        assert report(model, (2, 5), dtype=torch.long) == found


def test_wrong_example_inputs_are_named():
    model, tokens = Tokens(), torch.arange(10)
    with pytest.raises(ValueError, match=r"^example_inputs: expected neither input_size nor dtype"):
        report(model, (10,), example_inputs=tokens)
    with pytest.raises(ValueError, match=r"^example_inputs: expected neither input_size nor dtype"):
        report(model, example_inputs=tokens, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^example_inputs: expected at least one tensor"):
        report(model, example_inputs=())
    with pytest.raises(
        TypeError, match=r"^example_inputs: expected a Tensor, or a tuple or dict of arguments, got int"
    ):
        report(model, example_inputs=3)
    with pytest.raises(RuntimeError, match=r"^example_inputs: the model did not run on them: .*wrong"):
        report(model, example_inputs={"wrong": tokens})


def test_a_model_that_only_evaluates_such_an_input_is_counted_by_that():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))  # one value a channel does not train
    found = report(model, (1, 8))
    assert [row.dense_flops for row in found.layers] == [6 * 64, 6 * 32]
    assert found.outside is None
    assert "not known, as the model does not run in training mode" in str(found)


def test_what_the_last_training_forward_kept_is_shown_where_known():
    model = nn.Sequential(nn.Linear(100, 10, bias=False), nn.Linear(10, 10))
    sparsify_(model, SWATConfig(0.5, 0.8, skip=["1"], topk_period=5, weight_topk_period=2))
    fresh = report(model)
    assert fresh.layers[0].realised_sparsity == (None, None)
    assert "realised" not in str(fresh).split("\n\n")[1]
    x = torch.randn(10, 100, generator=torch.Generator().manual_seed(0))
    x[:, 30:] = 0  # more zeros than asked for, that nobody counts as kept
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    sparse, dense = report(model).layers
    assert sparse.realised_sparsity[0] == pytest.approx(0.5, abs=0.02)
    assert sparse.realised_sparsity[1] == pytest.approx(0.8, abs=0.02)
    assert sparse.steps_since_selection == (1, 3)
    assert (dense.realised_sparsity, dense.steps_since_selection) == ((None, None), (None, None))
    header, _, first, *_ = str(report(model, (10, 100))).split("\n\n")[1].splitlines()
    assert header.split()[:5] == ["layer", "kind", "sparsity", "realised", "age"]
    assert first.split()[3] == "50/80%"
    assert first.split()[5] == "1/3"


def test_the_kept_weights_of_each_layer_are_shown_where_layers_differ():
    def table(**config):
        model = small_network()
        sparsify_(model, SWATConfig(0.8, **config))
        found = report(model)
        return found, str(found).split("\n\n")[1].splitlines(), str(found)

    found, lines, text = table()
    assert lines[0].split() == ["layer", "kind", "sparsity", "kernels"]
    assert "\nkept:" not in text
    numels = [row.weights for row in found.layers]
    assert numels == [432, 2304, 384, 1728, 1920]
    counts = [432, 461, 77, 346, 384]
    assert [row.kept_weights for row in found.layers] == counts
    assert (found.weights, found.kept_weights) == (sum(numels), sum(counts))
    assert found.sparsity == pytest.approx(1 - 1700 / 6768)

    found, lines, text = table(distribution="erk")
    assert lines[0].split() == ["layer", "kind", "sparsity", "kept", "kernels"]
    assert "\nkept:" in text
    kept = [row.kept_weights for row in found.layers]
    assert sum(kept) == found.kept_weights == pytest.approx(0.2 * 6768, abs=5)
    for row, line in zip(found.layers, lines[2:], strict=True):
        share = f"{100 * row.kept_weights / found.kept_weights:.1f}".removesuffix(".0")
        count = str(row.kept_weights) if row.kept_weights < 1000 else f"{row.kept_weights / 1000:.2f} k"
        assert f"  {count} ({share}%)  " in line


def test_a_weight_that_two_layers_share_counts_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    sparsify_(model, SWATConfig(0.75))
    found = report(model)
    assert [row.kept_weights for row in found.layers] == [16, 16, 8]
    assert (found.weights, found.kept_weights) == (96, 24)


def test_a_resnet_fits_120_columns():
    model = build_model("resnet18", 1000, in_channels=3, stem="imagenet")
    sparsify_(model, SWATConfig(0.9))
    rows = report(model, (256, 3, 224, 224))
    known = {"realised_sparsity": (0.889, 0.901), "steps_since_selection": (10, 10)}
    rows = dataclasses.replace(rows, layers=tuple(dataclasses.replace(row, **known) for row in rows.layers))
    assert "88.9/90.1%  10/10" in str(rows)
    assert max(map(len, str(rows).splitlines())) <= 120


def test_the_model_may_be_one_layer_on_any_dtype():
    found = report(SWATLinear(8, 4, sparsity=0.5, dtype=torch.float64), (2, 8))
    assert found.layers[0].dense_bytes == 2 * 8 * 8
    assert "(model)" in str(found)
    assert report(SWATConv2d(4, 4, 3, groups=4, sparsity=0.5)).layers[0].kind == "Conv2d 3x3 4->4, depthwise"


@pytest.mark.parametrize(
    ("size", "error"),
    [(64, TypeError), ("64", TypeError), ((1, 2.0), TypeError), ((1, True), TypeError), ((1, 0), ValueError)],
)
def test_a_wrong_size_is_refused(size, error):
    with pytest.raises(error, match=r"^input_size: expected"):
        report(small_network(), size)


def test_a_size_that_does_not_fit_says_so():
    with pytest.raises(
        RuntimeError, match=r"^input_size: the model did not run on one torch.float32 tensor of shape \(1, 5, 8, 8\): "
    ):
        report(sparse_network(), (1, 5, 8, 8))
    with pytest.raises(TypeError, match=r"^model: expected"):
        report("model")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (123456, "123 k"),
        (9.994e6, "9.99 M"),
        (9.996e6, "10.0 M"),
        (1.5e9, "1.50 G"),
    ],
)
def test_counts_have_three_digits(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1.00 KiB"), (512, "512 B"), (2**24, "16.0 MiB"), (3 * 2**30, "3.00 GiB")],
)
def test_bytes_are_binary(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.9, "90%"), (0.955, "95.5%"), (0.0, "0%")])
def test_shares_are_percent(value, text):
    assert human_share(value) == text


def test_two_shares_are_one_cell():
    assert [human_shares(pair) for pair in ((0.9, 0.955), (0.9, None), (None, None))] == ["90/95.5%", "90/-%", "-"]


def test_render_aligns():
    assert render(("a", "b"), [("x", "10"), ("long", "2")], "<>", ("t", "12")) == "\n".join(
        ["a      b", "--------", "x     10", "long   2", "--------", "t     12"]
    )
