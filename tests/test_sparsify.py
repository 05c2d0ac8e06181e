"""sparsify_ and to_dense: what is swapped, what stays, what is said about it."""

import copy
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from networks import assert_same_state, batches, sgd, small_network, sparse_layers, sparse_network, train
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.hooks import RemovableHandle

import swat_ext
from swat_ext import SparsifyWarning, SWATConfig, SWATConv2d, SWATLinear, functional, sparsify_, to_dense

CONFIG = SWATConfig(sparsity=0.8)
ALL = SWATConfig(sparsity=0.8, skip=())


class OwnConv(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class OwnMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))


class OwnScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))


def test_layers_are_swapped_in_place_and_keep_everything():
    model = small_network().double().eval()
    model[3].train()
    model[3].weight.requires_grad_(False)
    modules, parameters = list(model.modules()), list(model.parameters())
    keys, flags = list(model.state_dict()), [module.training for module in model.modules()]
    calls = []
    handle = model[3].register_forward_hook(lambda module, *_: calls.append(type(module)))
    config = SWATConfig(0.8, 0.5, topk_period=7, weight_topk_period=2, backend="dense")
    result = sparsify_(model, config)

    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    assert list(model.state_dict()) == keys
    assert [module.training for module in model.modules()] == flags
    assert not model[3].weight.requires_grad
    assert isinstance(handle, RemovableHandle)
    model(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert calls == [SWATConv2d]

    assert result.swapped == ("3", "5", "7", "9")
    assert [type(model[index]) for index in (0, 3, 5, 7, 9)] == [nn.Conv2d, *[SWATConv2d] * 3, SWATLinear]
    for layer in sparse_layers(model):
        assert (layer.sparsity, layer.activation_sparsity, layer.backend) == (0.8, 0.5, "dense")
        assert (layer.topk_period, layer.weight_topk_period) == (7, 2)
        assert layer.weight_threshold.dtype == torch.float64
        assert layer.steps == 0


def test_an_optimizer_made_before_works():
    dense = small_network()
    optimizer = sgd(dense)
    sparsify_(dense, SWATConfig(sparsity=0.8, topk_period=3, weight_topk_period=4))
    train(dense, optimizer, batches(5))
    other = sparse_network()
    train(other, sgd(other), batches(5))
    assert_same_state(dense, other)


def test_the_model_itself_may_be_the_layer():
    layer = nn.Linear(3, 4)
    assert sparsify_(layer, CONFIG).swapped == ("",)
    assert type(layer) is SWATLinear


def test_a_shared_module_is_swapped_once_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 2))})
    result = sparsify_(model, CONFIG)
    assert result.swapped == ("a", "b.1")
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is SWATLinear
    dense = to_dense(model)
    assert dense["a"] is dense["b"][0]


def test_a_pattern_may_use_any_name_of_a_shared_module():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    assert sparsify_(model, SWATConfig(0.5, skip=["b"])).swapped == ("c",)


# --- skip -------------------------------------------------------------------------------------------------------------


def test_none_leaves_the_first_convolution_dense_and_the_classifier_not():
    model = small_network()
    result = sparsify_(model, CONFIG)
    assert [layer.name for layer in result.skipped] == ["0"]
    assert result.skipped[0].reason == "the first convolution (skip=None)"
    assert type(model[9]) is SWATLinear


def test_none_skips_no_linear_layer():
    assert sparsify_(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), CONFIG).swapped == ("0", "1")


@pytest.mark.parametrize(
    ("skip", "swapped"),
    [((), ("0", "3", "5", "7", "9")), (("9",), ("0", "3", "5", "7")), (("[03]", "9"), ("5", "7"))],
)
def test_patterns_replace_the_default(skip, swapped):
    assert sparsify_(small_network(), SWATConfig(0.5, skip=skip)).swapped == swapped


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("body", "; for the layers inside it write 'body.*'"),
        ("head", "(it has 'body.0', 'body.3', 'body.5', 'body.7', 'body.9')"),
        ("BODY.*", "(it has 'body.0'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern, hint):
    model = nn.ModuleDict({"body": small_network()})
    message = rf"^skip: pattern '{re.escape(pattern)}' matches no layer of model .*{re.escape(hint)}"
    with pytest.raises(ValueError, match=message):
        sparsify_(model, SWATConfig(0.5, skip=["body.0", pattern]))
    assert sparse_layers(model) == []


# --- What cannot be swapped -------------------------------------------------------------------------------------------


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyConv2d(4, 3)


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv2d(4, 4, 3))


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


IMPOSSIBLE = [
    (lambda: nn.ConvTranspose2d(4, 4, 3), "there is no sparse form of ConvTranspose2d"),
    (lambda: nn.Conv1d(4, 4, 3), "there is no sparse form of Conv1d"),
    (lambda: nn.Conv3d(4, 4, 3), "there is no sparse form of Conv3d"),
    (lambda: nn.Bilinear(4, 4, 4), "there is no sparse form of Bilinear"),
    (lambda: nn.LSTM(4, 4), "there is no sparse form of LSTM"),
    (lambda: nn.GRUCell(4, 4), "there is no sparse form of GRUCell"),
    (lambda: nn.MultiheadAttention(4, 2), "there is no sparse form of MultiheadAttention"),
    (lambda: OwnConv(4, 4, 3), "OwnConv has a forward of its own"),
    (OwnMatrix, "there is no sparse form of OwnMatrix"),
    (lazy, "it is lazy: run the model once"),
    (weight_normed, "its weight is not a parameter of its own"),
    (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "its weight is parametrized"),
    (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "its weight is not a parameter of its own"),
    (lambda: nn.Linear(4, 4, dtype=torch.complex64), r"its weight is torch\.complex64"),
    (patched, "its forward was replaced on the instance"),
]


@pytest.mark.parametrize(("make", "reason"), IMPOSSIBLE)
def test_what_cannot_be_swapped_is_reported(make, reason):
    layer = make()
    kind = type(layer)
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "odd": layer})
    with pytest.warns(SparsifyWarning, match=rf"(?s)leaves these layers dense:.*  odd \({kind.__name__}\): {reason}"):
        result = sparsify_(model, ALL)
    assert result.swapped == ("fine",)
    assert result.impossible[0].name == "odd"
    assert type(layer) is kind
    assert "Cannot be made sparse:\n  odd" in str(result)


@pytest.mark.parametrize(("make", "reason"), IMPOSSIBLE)
def test_what_is_skipped_by_name_brings_no_warning(make, reason):
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "odd": make()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sparsify_(model, SWATConfig(0.5, skip=["odd*"]))
    assert result.impossible == ()


@pytest.mark.parametrize(
    "layer", [nn.Embedding(4, 4), nn.LayerNorm((4, 4)), nn.BatchNorm2d(4), OwnScale(), nn.PReLU(4)]
)
def test_layers_that_multiply_nothing_are_not_mentioned(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sparsify_(nn.ModuleDict({"fine": nn.Linear(4, 4), "other": layer}), ALL)
    assert (result.skipped, result.impossible) == ((), ())


def test_a_transformer_encoder_evaluates_with_its_own_weights():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 2)})
    with pytest.warns(
        SparsifyWarning, match=r"encoder\.linear1 \(Linear\): nn\.TransformerEncoderLayer reads its weight"
    ):
        result = sparsify_(model, ALL)
    assert result.swapped == ("head",)


def test_a_layer_on_the_meta_device_is_swapped():
    with torch.device("meta"):
        model = small_network()
    sparsify_(model, CONFIG)
    model.to_empty(device="cpu")
    model.load_state_dict(small_network().state_dict())
    train(model, sgd(model), batches(3))
    other = sparse_network(topk_period=10, weight_topk_period=1)
    train(other, sgd(other), batches(3))
    assert_same_state(model, other)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_swapping_twice_is_an_error_that_changes_nothing():
    model = sparse_network()
    with pytest.raises(RuntimeError, match=r"^model: layer '3' is sparse already; .*to_dense"):
        sparsify_(model, SWATConfig(0.5, skip=()))
    assert type(model[0]) is nn.Conv2d
    assert {layer.sparsity for layer in sparse_layers(model)} == {0.8}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.ReLU(), "it has no nn.Conv2d and no nn.Linear"),
        (nn.Conv2d(3, 4, 3), r"\(the model itself\) \(Conv2d\): the first convolution"),
        (nn.Sequential(nn.Conv1d(3, 4, 3)), r"0 \(Conv1d\): there is no sparse form"),
    ],
)
def test_a_model_with_nothing_to_swap_is_an_error(model, reason):
    with pytest.raises(ValueError, match=f"(?s)^model: no layer would become sparse:.*{reason}"):
        sparsify_(model, CONFIG)


def test_arguments_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got list$"):
        sparsify_([], CONFIG)
    with pytest.raises(TypeError, match=r"^config: expected a SWATConfig, got float$"):
        sparsify_(small_network(), 0.9)
    with pytest.raises(TypeError, match=r"^model: expected"):
        to_dense("model")
    with pytest.raises(ValueError, match=r"^model: expected at least one SWATConv2d or SWATLinear"):
        to_dense(small_network())


# --- State and back ---------------------------------------------------------------------------------------------------


def test_state_dicts_go_both_ways(tmp_path):
    sparse = sparse_network()
    train(sparse, sgd(sparse), batches(4))
    torch.save(sparse.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    plain = small_network(seed=1)
    plain.load_state_dict(state)
    assert_same_state(plain, sparse)
    again = sparse_network(seed=2)
    again.load_state_dict(plain.state_dict())
    x, _ = batches(1)[0]
    assert torch.equal(again.eval()(x), sparse.eval()(x))


def test_a_whole_model_can_be_saved(tmp_path):
    model = sparse_network()
    train(model, sgd(model), batches(2))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x, _ = batches(1)[0]
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_to_dense_computes_the_evaluation_and_leaves_the_model(memory_format):
    model = sparse_network(dtype=torch.float64).to(memory_format=memory_format)
    train(model, sgd(model), batches(4, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    dense = to_dense(model)
    x = batches(1, dtype=torch.float64)[0][0]
    torch.testing.assert_close(dense(x), model(x), rtol=1e-12, atol=1e-12)

    assert {type(module) for module in dense.modules()} == {type(module) for module in small_network().modules()}
    for mine, plain in zip(dense.modules(), small_network().modules(), strict=True):
        assert vars(mine).keys() == vars(plain).keys()
    assert list(dense.state_dict()) == list(before)
    for index in (3, 5, 7, 9):
        weight = dense[index].weight
        assert int((weight != 0).sum()) == functional.keep_count(weight.numel(), 0.8)
        assert weight.stride() == model[index].weight.stride()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert len(sparse_layers(model)) == 4
    assert not dense.training
    sparsify_(dense, CONFIG)


def test_to_dense_of_a_training_model_does_not_disturb_it():
    model, other = sparse_network(), sparse_network()
    first, second = sgd(model), sgd(other)
    for number in range(7):
        train(model, first, batches(1, first=number))
        train(other, second, batches(1, first=number))
        to_dense(model)
    assert_same_state(model, other)


def test_to_dense_drops_no_row_of_a_tied_embedding():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    model = Tied().eval()
    sparsify_(model, CONFIG)
    assert model.head.weight is model.embedding.weight
    dense, x = to_dense(model), torch.arange(20)
    torch.testing.assert_close(dense(x), model(x))


def test_to_dense_keeps_a_weight_of_two_layers_shared():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    sparsify_(model, CONFIG)
    dense = to_dense(model)
    assert dense[0].weight is dense[1].weight
    assert int((dense[0].weight != 0).sum()) == functional.keep_count(36, 0.8)


def test_the_library_does_not_import_its_oracle():
    code = "import sys, swat_ext; sys.exit('swat_ext.reference' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(swat_ext.__all__) <= set(dir(swat_ext))


# --- Subclasses that compute the same


class NamedConv(nn.Conv2d):
    """Adds a name and a method, and computes what its class does."""

    label = "mine"

    def out_shape(self) -> int:
        return self.out_channels


class NamedLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


def test_subclasses_without_a_forward_of_their_own_become_sparse_and_stay_what_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(NamedConv(3, 8, 3, padding=1), nn.Flatten(), NamedLinear(8 * 16, 5))
    x = torch.randn(2, 3, 4, 4)
    assert sparsify_(model, ALL).swapped == ("0", "2")
    for layer, dense, sparse in ((model[0], NamedConv, SWATConv2d), (model[2], NamedLinear, SWATLinear)):
        assert isinstance(layer, dense)
        assert isinstance(layer, sparse)
    assert (model[0].label, model[0].out_shape()) == ("mine", 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    assert [layer.steps for layer in sparse_layers(model)] == [1, 1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(model[0])
        assert torch.equal(twin.eval()(x), model.eval()(x))
    dense = to_dense(model)
    assert [type(dense[0]), type(dense[2])] == [NamedConv, NamedLinear]
    torch.testing.assert_close(dense(x), model.eval()(x))


def test_the_projection_of_an_attention_is_read_past_its_forward():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.warns(SparsifyWarning, match="out_proj.*reads its weight without calling it"):
        sparsify_(nn.Sequential(attention, nn.Linear(8, 8)), ALL)
    assert type(attention.out_proj) is not SWATLinear


def test_a_dense_copy_of_a_model_in_training_computes_what_evaluation_does():
    model = sparse_network(topk_period=1000, weight_topk_period=1000)
    train(model, sgd(model), batches(5))
    dense = to_dense(model)  # the thresholds are five steps old
    assert model.training
    x, _ = batches(1, first=9)[0]
    torch.testing.assert_close(dense.eval()(x), model.eval()(x))
    for name, layer in dense.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and name != "0":
            assert int((layer.weight != 0).sum()) == functional.keep_count(layer.weight.numel(), 0.8)
