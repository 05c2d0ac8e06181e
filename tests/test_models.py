"""The networks, and the ReLU that keeps one bit an element."""

import copy

import pytest
import torch
from torch import nn

from swat_ext import SWATConfig, sparsify_
from swat_ext.models import (
    MODELS,
    STEMS,
    BitReLU,
    WideResNet,
    build_model,
    densenet121,
    resnet18,
    resnet50,
    swap_relus_,
    vgg16,
    wrn16_8,
)
from swat_ext.models.relu import pack_bits, unpack_bits
from swat_ext.training import saved_bytes


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert _parameters(resnet18(1000, stem="imagenet")) == 11_689_512
        assert _parameters(resnet50(1000)) == 25_557_032
        assert _parameters(resnet18(10)) == 11_173_962
        assert _parameters(vgg16(10)) == 14_728_266
        assert _parameters(wrn16_8(10)) == 10_961_370
        assert _parameters(densenet121(10)) == 6_956_298
        assert _parameters(densenet121(1000, stem="imagenet")) == 7_978_856


@pytest.mark.parametrize(("name", "stem"), [(name, stem) for name, stems in STEMS.items() for stem in stems])
def test_every_network_trains_sparse(name: str, stem: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 7, in_channels=2, stem=stem, width=0.125)
    side = 32 if stem == "cifar" else 64
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 2, side, side)).shape == (1, 7)
    sparsify_(model.train(), SWATConfig(0.9))
    swap_relus_(model)
    assert not any(type(module) is nn.ReLU for module in model.modules())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    images = torch.randn(4, 2, side, side).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = nn.functional.cross_entropy(model(images), torch.randint(7, (4,)))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
    # A bias before BatchNorm has no gradient but rounding.
    unchanged = [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    assert all(key.endswith("bias") for key in unchanged), unchanged


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", [8, 28])
def test_smaller_images_pass(name: str, side: int) -> None:
    model = build_model(name, 10, in_channels=1, stem="cifar", width=0.125)
    assert model(torch.randn(2, 1, side, side)).shape == (2, 10)


def test_the_imagenet_stem_is_the_published_one() -> None:
    with torch.device("meta"):
        model = resnet50(1000)
        sizes: list[torch.Size] = []
        for stage in (model.maxpool, model.layer1, model.layer4):
            stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert [tuple(size) for size in sizes] == [(2, 64, 56, 56), (2, 256, 56, 56), (2, 2048, 7, 7)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("stem", "shrinks"), [("cifar", 1), ("imagenet", 4)])
def test_stages_of_resnet(name: str, stem: str, shrinks: int) -> None:
    model = build_model(name, 7, in_channels=2, stem=stem, width=0.125)
    sizes: list[torch.Size] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    assert model(torch.randn(2, 2, 64, 64)).shape == (2, 7)
    expansion = 4 if name == "resnet50" else 1
    expected = [(2, 8 * 2**i * expansion, 64 // shrinks // 2**i, 64 // shrinks // 2**i) for i in range(4)]
    assert [tuple(size) for size in sizes] == expected


@pytest.mark.parametrize(("width", "channels"), [(1, 64), (0.25, 16), (0.3, 16), (0.001, 8), (2, 128)])
def test_width_rounds_to_eight_channels(width: float, channels: int) -> None:
    with torch.device("meta"):
        assert resnet18(10, width=width).conv1.out_channels == channels


@pytest.mark.parametrize(
    ("argument", "value"),
    [("stem", "tall"), ("width", 0.0), ("width", float("inf")), ("num_classes", 0), ("in_channels", 0)],
)
@pytest.mark.parametrize("name", MODELS)
def test_wrong_arguments_are_named(name: str, argument: str, value: object) -> None:
    arguments = {"num_classes": 10, "in_channels": 3, "stem": "cifar", argument: value}
    with pytest.raises(ValueError, match=argument):
        build_model(name, **arguments)  # type: ignore[arg-type]


def test_a_stem_that_a_network_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="stem: expected one of cifar, got 'imagenet'"):
        build_model("vgg16", 10, in_channels=3, stem="imagenet")
    with pytest.raises(ValueError, match="depth: expected 6"):
        WideResNet(15, 8, num_classes=10)


def test_unknown_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="resnet18, resnet50, vgg16, wrn16_8, got 'resnet19'"):
        build_model("resnet19", 10, in_channels=3, stem="cifar")


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_bits_round_trip(count: int, generator: torch.Generator) -> None:
    flags = torch.rand(count, generator=generator) < 0.5
    bits = pack_bits(flags)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-count // 8)
    assert [bool(bits[i // 8] >> i % 8 & 1) for i in range(count)] == flags.tolist()
    assert torch.equal(unpack_bits(bits, count), -flags.to(torch.int8))


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "strided": wide[..., ::2],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last"])
def test_bit_relu_is_relu(
    dtype: torch.dtype, inplace: bool, layout: str, grad_layout: str, generator: torch.Generator
) -> None:
    x = torch.randn(3, 5, 4, 7, generator=generator).to(dtype)
    x.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-38])
    grad = torch.randn(3, 5, 4, 7, generator=generator).to(dtype)
    grad.view(-1)[-8:] = float("inf")
    results = []
    for relu in (nn.ReLU(inplace), BitReLU(inplace)):
        leaf = _layouts(x)[layout].clone(memory_format=torch.preserve_format).requires_grad_()
        inner = leaf * 1
        output = relu(inner)
        assert (output.data_ptr() == inner.data_ptr()) == inplace
        output.backward(_layouts(grad)[grad_layout])
        results.append((output.detach(), leaf.grad))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_bit_relu_saves_one_bit_an_element() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    assert saved_bytes(lambda: nn.ReLU()(x)) == 4 * x.numel()
    assert saved_bytes(lambda: BitReLU()(x)) == x.numel() // 8


def test_bit_relu_has_a_second_derivative() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: BitReLU()(v) ** 3, (x,))


def test_bit_relu_compiles() -> None:
    relu = torch.compile(BitReLU(inplace=True), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    relu(x * 1).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x > 0).float())


def test_bit_relu_without_gradients_is_plain() -> None:
    x = torch.randn(3, 3)
    with torch.no_grad():
        assert torch.equal(BitReLU()(x), x.clamp(min=0))


def test_swap_relus_takes_plain_ones_alone() -> None:
    model = nn.Sequential(nn.ReLU(True), nn.ReLU6(), nn.Sequential(nn.ReLU()), nn.LeakyReLU())
    assert swap_relus_(model) == 2
    assert type(model[0]) is BitReLU
    assert model[0].inplace
    assert type(model[1]) is nn.ReLU6
    assert swap_relus_(model) == 0


def test_a_sparse_network_holds_less_only_with_bit_relus() -> None:
    torch.manual_seed(0)
    dense = resnet18(10, width=0.25).to(memory_format=torch.channels_last)
    swat = copy.deepcopy(dense)
    sparsify_(swat, SWATConfig(0.9))
    lean = copy.deepcopy(swat)
    swap_relus_(lean)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)

    def held(model: nn.Module) -> int:
        return saved_bytes(lambda: model(images).sum(), exclude=[*model.parameters(), *model.buffers()])

    assert held(lean) < 0.75 * held(dense) < held(swat)
    torch.testing.assert_close(lean(images), swat(images), rtol=0, atol=0)
