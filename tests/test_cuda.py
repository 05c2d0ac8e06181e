"""What only a GPU can show: streams, graphs, no waiting, the same bits each time, training as on the CPU."""

import copy

import pytest
import torch
from checks import assert_identical
from conftest import needs_cuda
from torch import Tensor, nn

import swat_ext
from swat_ext import functional
from swat_ext.ops import library as ops

pytestmark = needs_cuda


def _model(**config: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip
    swat_ext.sparsify_(model, swat_ext.SWATConfig(sparsity=0.8, skip=(), backend="sparse", **config))
    return model


def _train(model: nn.Module, steps: int, device: str) -> list[Tensor]:
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        input = torch.randn(8, 3, 16, 16, generator=generator).to(device)
        labels = torch.randint(10, (8,), generator=generator).to(device)
        nn.functional.cross_entropy(model(input), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.fixture(autouse=True)
def full_precision() -> object:
    """Of cuDNN, and repeatable: it computes the weight gradients."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


def test_trains_as_on_the_cpu() -> None:
    for ours, theirs in zip(
        _train(_model(topk_period=1), 4, "cuda"), _train(_model(topk_period=1), 4, "cpu"), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_repeats_bit_for_bit() -> None:
    for first, second in zip(_train(_model(), 4, "cuda"), _train(_model(), 4, "cuda"), strict=True):
        assert_identical(first, second, "parameter after training")


def test_a_training_step_does_not_wait_for_the_device() -> None:
    model = _model().cuda()
    input = torch.randn(8, 3, 16, 16, device="cuda")
    model(input).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_saved_has_the_length_of_its_budget() -> None:
    layer = swat_ext.SWATConv2d(16, 32, 3, sparsity=0.9, backend="sparse").cuda()
    input = torch.randn(4, 16, 20, 20, device="cuda")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(input)
    lengths = [ops.most_kept(functional.keep_count(t.numel(), 0.9), t.numel()) for t in (layer.weight, input)]
    assert [t.numel() for t in saved if t.is_floating_point()] == lengths


def test_cuda_graph() -> None:
    weight = torch.randn(24, 16, 3, 3, device="cuda", requires_grad=True)
    threshold = torch.tensor(0.8, device="cuda")
    static_input = torch.randn(4, 16, 12, 12, device="cuda")

    def packed(tensor: Tensor, keep: int) -> functional.Packed:
        room = ops.most_kept(keep, tensor.numel())
        return functional.Packed(*torch.ops.swat_ext.compress(tensor, threshold, keep=keep, room=room), tensor.shape)

    def step(input: Tensor) -> tuple[Tensor, Tensor]:
        packed_input, packed_weight = packed(input, input.numel() // 5), packed(weight.detach(), weight.numel() // 2)
        output = functional.conv2d_packed(input, weight, None, packed_weight, packed_input, padding=1)
        return output, torch.autograd.grad(output.square().sum(), weight)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(static_input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static_input)
    for seed in range(3):
        fresh = torch.randn(static_input.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        static_input.copy_(fresh)
        graph.replay()
        for ours, expected in zip(captured, step(fresh), strict=True):
            assert_identical(ours, expected, "result of a replay")


def test_another_stream() -> None:
    input = torch.randn(8, 64, 56, 56, device="cuda")
    weight = torch.randn(64, 64, 3, 3, device="cuda")
    keywords = {"padding": 1, "weight_threshold": 1.3, "activation_threshold": 1.3}
    expected = functional.conv2d(input, weight, **keywords)
    stream = torch.cuda.Stream()
    for _ in range(5):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The convolution reads what this stream writes late.
            torch.cuda._sleep(10_000_000)
            late = input * 1.0
            result = functional.conv2d(late, weight, **keywords)
        stream.synchronize()
        assert_identical(result, expected, "result on another stream")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_model(dtype: torch.dtype) -> None:
    model = _model().cuda().to(dtype)
    output = model(torch.randn(8, 3, 16, 16, device="cuda", dtype=dtype))
    output.float().sum().backward()
    assert output.dtype == dtype
    assert all(parameter.grad.dtype == dtype for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_oracle(dtype: torch.dtype) -> None:
    """Of a layer whose activations are unpacked in several parts, and of a linear layer."""
    torch.manual_seed(0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for weight_size, input_size, function, keywords in (
        ((48, 64, 3, 3), (64, 64, 56, 56), functional.conv2d, {"padding": 1}),
        ((48, 64), (700, 64), functional.linear, {}),
    ):
        weight = torch.randn(weight_size, dtype=dtype, device="cuda", requires_grad=True)
        input = torch.randn(input_size, dtype=dtype, device="cuda", requires_grad=True)
        output = function(input, weight, weight_threshold=1.2, activation_threshold=0.9, **keywords)
        grad = torch.randn_like(output)
        got = torch.autograd.grad(output, (input, weight), grad)
        plain = nn.functional.conv2d if len(weight_size) == 4 else nn.functional.linear
        x, w = (tensor.detach().double().requires_grad_() for tensor in (input, weight))
        top_x, top_w = (torch.where(t.detach().abs() < limit, 0, t.detach()) for t, limit in ((x, 0.9), (w, 1.2)))
        expected = (
            torch.autograd.grad(plain(x, top_w, **keywords), x, grad.double())[0],
            torch.autograd.grad(plain(top_x, w, **keywords), w, grad.double())[0],
        )
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_millions_of_elements() -> None:
    """More blocks than run at once, and a scan of more than one tile."""
    input = torch.randn(64, 256, 56, 56, device="cuda")
    threshold = functional.kth_magnitude(input, input.numel() // 10)
    assert int((input.abs() >= threshold).sum()) == input.numel() // 10
    for memory_format in (torch.contiguous_format, torch.channels_last):
        strided = input.contiguous(memory_format=memory_format)
        packed = functional.compress(strided, threshold)
        expected = torch.where(input.abs() >= threshold, input, 0.0)
        assert torch.equal(packed.values, input[input.abs() >= threshold])
        for channels_last in (False, True):
            assert torch.equal(functional.decompress(packed, channels_last=channels_last), expected)


# --- The layers around ------------------------------------------------------------------------------------------------


def _with_layers_around(batchnorm: str, *, swapped: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip
    skip = () if swapped else ("1", "2", "3", "5", "6")
    swat_ext.sparsify_(model, swat_ext.SWATConfig(sparsity=0.8, skip=skip, backend="sparse", batchnorm=batchnorm))
    return model.to("cuda")


def _held(model: nn.Module) -> int:
    input = torch.randn(32, 3, 16, 16, device="cuda")
    model(input).sum().backward()
    before = torch.cuda.memory_allocated()
    output = model(input)
    held = torch.cuda.memory_allocated() - before
    output.sum().backward()
    return held


@pytest.mark.parametrize("batchnorm", ["exact", "bf16", "int8"])
def test_the_layers_around_train_and_hold_less(batchnorm: str) -> None:
    runs = [_train(_with_layers_around(batchnorm), 4, "cuda") for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_identical(first, second, "parameter after training")
        assert first.isfinite().all()
    assert _held(_with_layers_around(batchnorm)) < 0.8 * _held(_with_layers_around(batchnorm, swapped=False))


@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layers_around_do_not_wait_for_the_device(autocast: torch.dtype) -> None:
    model = _with_layers_around("int8")
    input = torch.randn(8, 3, 16, 16, device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=autocast, enabled=autocast != torch.float32):
                output = model(input)
            output.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layers_around_train_as_on_the_cpu(memory_format: torch.memory_format) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layers = nn.Sequential(swat_ext.SWATBatchNorm2d(48), swat_ext.SWATReLU(), swat_ext.SWATMaxPool2d(3, 2, 1))
        layers.to(device)
        # In eighths: what is not equal is far enough apart for both devices to agree on the largest.
        leaf = torch.randn(6, 48, 33, 31).mul(8).round().div(8).to(device)
        leaf = leaf.contiguous(memory_format=memory_format).requires_grad_()
        output = layers(leaf)
        output.backward(torch.randn(output.shape).to(device))
        results.append([output, leaf.grad, *layers.buffers(), *(each.grad for each in layers.parameters())])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-4, atol=1e-4)
