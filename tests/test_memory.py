"""profile_memory: what is held and by whom, the dense network beside it, the peak, and that nothing is left behind."""

import copy
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from held import saved_bytes
from networks import assert_same_state, small_network, sparse_network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swat_ext import MemoryProfile, SWATConfig, profile_memory, sparsify_
from swat_ext.models import build_model

SIZE = (4, 3, 8, 8)


def _input(*size: int) -> Tensor:
    return torch.randn(size or SIZE, generator=torch.Generator().manual_seed(0))


def _rows(profile: MemoryProfile) -> dict[tuple[str, str], int]:
    return {(layer.name, layer.kind): layer.held_bytes for layer in profile.layers}


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg16"])
def test_the_sum_is_what_is_saved_and_dense_is_the_dense_network(name: str, sparse: bool) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, in_channels=3, stem="cifar", width=0.125)
    x = _input(4, 3, 32, 32).to(memory_format=torch.channels_last)
    dense = saved_bytes(lambda: model(x), exclude=[*model.parameters(), *model.buffers(), x])
    if sparse:
        sparsify_(model, SWATConfig(0.9))
    profile = profile_memory(model, x)
    assert profile.held_bytes == saved_bytes(lambda: model(x), exclude=[*model.parameters(), *model.buffers(), x])
    assert profile.dense_bytes == dense
    assert (profile.held_bytes < dense) if sparse else (profile.held_bytes == dense)
    assert sum(layer.held_bytes for layer in profile.layers) == profile.held_bytes
    assert sum(layer.dense_bytes or 0 for layer in profile.layers) == dense


def test_rows_name_the_module_that_saved_first() -> None:
    model = small_network()
    with profile_memory(model) as profile:
        model(_input()).sum().backward()
    numel = 4 * 16 * 64
    rows = _rows(profile)
    # The first convolution's input is the network's; BatchNorm saves its input, mean and deviation.
    assert rows["1", "BatchNorm2d"] == 4 * (numel + 2 * 16)
    assert rows["2", "ReLU"] == rows["4", "ReLU"] == 4 * numel
    assert rows["6", "ReLU"] == 4 * 4 * 24 * 16
    # A ReLU's output is what the next convolution saves too; only what nobody else saved is the linear layer's.
    assert not {name for name, _ in rows} & {"0", "3", "5", "7"}
    assert rows["9", "Linear"] == 4 * 4 * 24 * 16
    assert profile.dense_note == "the model is dense"
    assert profile.held_bytes == profile.dense_bytes == sum(rows.values())


class _Functional(nn.Module):
    """Calls functions that cannot be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(F.gelu(self.conv(x))))


def test_functions_called_by_a_container_are_named() -> None:
    model = nn.Sequential(_Functional(), nn.Flatten())
    sparsify_(model, SWATConfig(0.9))
    labels = torch.zeros(4, dtype=torch.long)
    with profile_memory(model) as profile:
        F.cross_entropy(model(_input()), labels).backward()
    rows = _rows(profile)
    assert rows["0", "gelu (functional)"] == rows["0", "relu (functional)"] == 4 * 4 * 8 * 64
    assert rows["0.last", "SWATConv2d"] < 4 * 4 * 8 * 64
    assert rows["(outside the model)", "cross_entropy (functional)"] > 0
    dense = {(layer.name, layer.kind): layer.dense_bytes for layer in profile.layers}
    assert dense["0.last", "SWATConv2d"] == 4 * 4 * 8 * 64  # gelu keeps its input, so nobody saved this one before
    assert "gelu (functional)" in str(profile)


def test_dense_follows_who_would_have_saved_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    sparsify_(model, SWATConfig(0.9, skip=()))
    profile = profile_memory(model, _input())
    rows = {layer.name: layer for layer in profile.layers}
    assert rows["1"].kind == "SWATReLU"
    assert [layer.name for layer in profile.layers] == ["0", "1", "2", "3"]  # all sparse, the last one's ReLU too
    assert rows["1"].dense_bytes == 4 * 4 * 8 * 36
    assert rows["1"].held_bytes == 4 * 8 * 36 // 8
    assert rows["2"].dense_bytes == 0 < rows["2"].held_bytes


def test_rows_come_in_the_order_of_their_forwards() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Dropout(), nn.Conv2d(8, 8, 1), nn.Sigmoid())
    sparsify_(model, SWATConfig(0.9, skip=()))
    model.eval()  # Dropout passes its input through, which the dense convolution after it saves
    profile = profile_memory(model, _input(4, 8, 6, 6).requires_grad_())
    assert [layer.name for layer in profile.layers] == ["0", "1", "3", "4"]
    assert [layer.dense_bytes for layer in profile.layers] == [4 * 4 * 8 * 36, 0, 4 * 4 * 8 * 36, 4 * 4 * 8 * 36]


def test_modules_called_several_times_and_shared_ones() -> None:
    shared = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = nn.Sequential(shared, shared, nn.Linear(8, 2))
    profile = profile_memory(model, _input(5, 8))
    rows = {layer.name: layer for layer in profile.layers}
    assert set(rows) == {"0.1"}  # the linear layers save what tanh saved
    assert rows["0.1"].calls == 2
    assert rows["0.1"].held_bytes == 2 * 5 * 8 * 4


def test_most_is_what_is_held_at_once() -> None:
    model = sparse_network()
    with profile_memory(model) as once:
        model(_input()).sum().backward()
    with profile_memory(model) as thrice:
        for _ in range(3):
            model(_input()).sum().backward()
    with profile_memory(model) as together:
        (model(_input()).sum() + model(_input()).sum()).backward()
    assert thrice.held_bytes == pytest.approx(once.held_bytes, rel=0.02)
    assert thrice.dense_bytes == once.dense_bytes
    assert together.held_bytes == pytest.approx(2 * once.held_bytes, rel=0.02)
    assert together.dense_bytes == 2 * (once.dense_bytes or 0)


def test_checkpointed_blocks_hold_their_inputs_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x * 2, use_reentrant=False)

    profile = profile_memory(Block(), _input(2, 4, 8, 8).requires_grad_())
    assert profile.held_bytes == 2 * 4 * 64 * 4


def test_nothing_is_held_without_gradients() -> None:
    model = sparse_network()
    with torch.no_grad(), profile_memory(model) as profile:
        model(_input())
    assert profile.layers == ()
    assert profile.held_bytes == profile.dense_bytes == 0
    assert "0 B held" in str(profile)


def test_frozen_model_given_an_input_needs_no_backward() -> None:
    profile = profile_memory(small_network().requires_grad_(False), _input())
    assert profile.held_bytes == 0


def test_dense_is_skipped_when_asked() -> None:
    profile = profile_memory(sparse_network(), _input(), dense=False)
    assert profile.dense_bytes is None
    assert profile.dense_note == "not asked for"
    assert all(layer.dense_bytes is None for layer in profile.layers)
    assert "dense: not asked for." in str(profile)


def test_a_model_that_needs_values_has_no_dense_bytes_and_a_reason() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = sparse_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum().item() < 1e9 else x

    profile = profile_memory(Branch(), _input())
    assert profile.held_bytes > 0
    assert profile.dense_bytes is None
    assert "does not run on shapes alone" in profile.dense_note


def test_the_model_given_with_an_input_stays_as_it_was() -> None:
    model = sparse_network()
    model.append(nn.Dropout(0.5))
    before, state = copy.deepcopy(model), torch.get_rng_state()
    seen: list[Tensor] = []
    handle = model[3].register_forward_hook(lambda module, args, output: seen.append(output))
    profile_memory(model, _input())
    handle.remove()
    assert_same_state(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen == []
    assert _hooks(model) == 0


@pytest.mark.parametrize("where", ["model", "block"])
def test_hooks_go_when_something_raises(where: str) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("as meant")

    model = nn.Sequential(nn.Linear(8, 8), *([Failing()] if where == "model" else []))
    profile = profile_memory(model)

    def run() -> None:
        with profile:
            model(_input(2, 8))
            raise ValueError("as meant")

    with pytest.raises(ValueError, match="as meant"):
        run()
    assert _hooks(model) == 0
    with pytest.raises(RuntimeError, match="held_bytes: the profile has no results"):
        _ = profile.held_bytes
    x = _input(2, 8).requires_grad_()
    assert type(x.exp().grad_fn._saved_result) is Tensor  # type: ignore[union-attr]


def test_a_model_that_raises_and_goes_on_is_still_attributed() -> None:
    class Fallback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.even = nn.Sequential(nn.Linear(5, 5)), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.odd(x)
            except RuntimeError:
                return torch.exp(self.even(x))

    rows = _rows(profile_memory(Fallback(), _input(2, 8)))
    assert rows == {("even.1", "Tanh"): 64, ("", "exp (functional)"): 64}


def test_a_profile_within_another_is_noted_by_the_outer_one() -> None:
    model = sparse_network()
    with profile_memory(model) as outer:
        inner = profile_memory(model, _input())
        model(_input()).sum().backward()
    assert inner.held_note == ""
    assert inner.dense_bytes is not None
    assert "another profile" in outer.held_note
    assert (outer.dense_bytes, outer.dense_note) == (None, "not known, as what is held is not")
    assert _hooks(model) == 0


def test_a_graph_that_outlives_the_block_works_and_is_freed() -> None:
    model = small_network()
    with profile_memory(model, dense=False) as profile:
        loss = model(_input()).sum()
    held = profile.held_bytes
    loss.backward()
    assert profile.held_bytes == held > 0
    gradients = [parameter.grad for parameter in model.parameters()]
    plain = small_network()
    plain(_input()).sum().backward()
    for mine, expected in zip(gradients, plain.parameters(), strict=True):
        assert mine is not None
        assert torch.equal(mine, expected.grad)  # type: ignore[arg-type]


def test_inputs_of_a_loop_and_the_model_are_not_kept() -> None:
    model, inputs = small_network(), []
    with profile_memory(model) as profile:
        for _ in range(3):
            x = _input()
            inputs.append(weakref.ref(x))
            model(x).sum().backward()
        del x
        gc.collect()
        assert [reference() for reference in inputs] == [None] * 3
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert profile.held_bytes > 0


def test_the_peak_grows_by_what_is_held() -> None:
    model = nn.Sequential(*(nn.Tanh() for _ in range(8)))
    x = torch.randn(16384, 256).requires_grad_()
    with profile_memory(model, dense=False) as profile:
        model(x).sum().backward()
    assert profile.held_bytes == 8 * x.nbytes
    assert profile.device == "cpu"
    if profile.peak_bytes is not None and profile.start_bytes is not None:
        assert profile.peak_bytes - profile.start_bytes > 0.5 * profile.held_bytes
        assert "more than at the start" in str(profile)


def test_result_as_text_dict_and_picture(tmp_path: Path) -> None:
    profile = profile_memory(sparse_network(), {"input": _input()})
    text = str(profile)
    assert text.startswith("Sequential: ")
    assert "if it were dense (" in text
    plain = json.loads(json.dumps(profile.to_dict()))
    assert plain["held_bytes"] == sum(layer["held_bytes"] for layer in plain["layers"])
    assert sum(held for _, held, _ in profile.by_kind().values()) == profile.held_bytes
    profile.plot(tmp_path / "held.png", most=3)
    assert (tmp_path / "held.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="most: expected at least 1, got 0"):
        profile.plot(tmp_path / "held.png", most=0)


def test_wrong_arguments_are_named() -> None:
    model = small_network()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        profile_memory("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="input: expected a Tensor, or a tuple or dict of arguments, got int"):
        profile_memory(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dense: expected True or False, got 1"):
        profile_memory(model, dense=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"before torch\.compile"):
        profile_memory(torch.compile(model))
    with pytest.raises(ValueError, match="meta device"):
        profile_memory(sparse_network().to("meta"))


def test_a_profile_is_read_after_its_block_and_used_once() -> None:
    model = small_network()
    profile = profile_memory(model)
    with pytest.raises(RuntimeError, match="layers: the profile has no results"):
        _ = profile.layers
    with profile:
        with pytest.raises(RuntimeError, match="held_bytes: the profile has no results"):
            _ = profile.held_bytes
        model(_input())
    with pytest.raises(RuntimeError, match="of one block"), profile:
        pass
    with pytest.raises(RuntimeError, match="no forward of model"), profile_memory(model):
        pass
    with pytest.raises(AttributeError, match="colour"):
        _ = profile.colour
