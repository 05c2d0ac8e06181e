"""Bad input raises an exception that names the argument, what was expected and what came."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swat_ext import functional

_THRESHOLDS = {"weight_threshold": 0.0, "activation_threshold": 0.0}


def _conv2d(**changes: Any) -> Any:
    """conv2d of 6 to 4 channels in 2 groups, with some arguments changed."""
    arguments: dict[str, Any] = {
        "input": torch.randn(2, 6, 5, 7),
        "weight": torch.randn(4, 3, 3, 3),
        "bias": torch.randn(4),
        "groups": 2,
        **_THRESHOLDS,
        **changes,
    }
    return functional.conv2d(**arguments)


def _linear(**changes: Any) -> Any:
    arguments = {
        "input": torch.randn(2, 6),
        "weight": torch.randn(4, 6),
        "bias": torch.randn(4),
        **_THRESHOLDS,
        **changes,
    }
    return functional.linear(**arguments)


def _packed(**changes: Any) -> Any:
    """conv2d_packed of 6 to 4 channels, with some arguments changed."""
    input, weight = torch.randn(2, 6, 5, 7), torch.randn(4, 6, 3, 3)
    arguments: dict[str, Any] = {
        "input": input,
        "weight": weight,
        "bias": None,
        "packed_weight": functional.compress(weight, 0),
        "packed_input": functional.compress(input, 0),
        **changes,
    }
    return functional.conv2d_packed(**arguments)


_VALUES = torch.randn(100)

# What is called, with what, the exception, the argument it names, and words that say what was expected and what came.
_CASES: list[tuple[str, Callable[[], Any], type[Exception], str, str]] = [
    # --- magnitude
    ("k 0", lambda: functional.kth_magnitude(_VALUES, 0), ValueError, "k", "100.*got 0"),
    ("k negative", lambda: functional.kth_magnitude(_VALUES, -1), ValueError, "k", "got -1"),
    ("k above", lambda: functional.kth_magnitude(_VALUES, 101), ValueError, "k", "100.*got 101"),
    ("nothing to select", lambda: functional.kth_magnitude(torch.empty(0), 1), ValueError, "k", "0.*got 1"),
    ("k float", lambda: functional.kth_magnitude(_VALUES, 2.5), TypeError, "k", "got.*(float|2.5)"),
    ("k bool", lambda: functional.kth_magnitude(_VALUES, True), TypeError, "k", "integer.*True"),
    ("list", lambda: functional.kth_magnitude([1.0], 1), TypeError, "input", "Tensor.*list"),
    (
        "integers",
        lambda: functional.kth_magnitude(torch.arange(3), 1),
        TypeError,
        "input",
        "float32, float64, bfloat16 or float16, got.*int64",
    ),
    # --- compress
    ("list", lambda: functional.compress([1.0], 0), TypeError, "input", "Tensor.*list"),
    ("uint8", lambda: functional.compress(_VALUES.byte(), 0), TypeError, "input", "float32.*uint8"),
    ("complex", lambda: functional.compress(_VALUES.to(torch.complex64), 0), TypeError, "input", "float32.*complex64"),
    ("sparse layout", lambda: functional.compress(_VALUES.to_sparse(), 0), TypeError, "input", "strided.*sparse"),
    ("below 0", lambda: functional.compress(_VALUES, -1.0), ValueError, "threshold", "at least 0.*-1.0"),
    ("not a number", lambda: functional.compress(_VALUES, float("nan")), ValueError, "threshold", "at least 0.*nan"),
    ("truth", lambda: functional.compress(_VALUES, True), TypeError, "threshold", "float.*bool"),
    ("tensor below 0", lambda: functional.compress(_VALUES, torch.tensor(-2.0)), ValueError, "threshold", "0.*-2.0"),
    ("true tensor", lambda: functional.compress(_VALUES, torch.tensor(True)), TypeError, "threshold", "float.*bool"),
    ("text", lambda: functional.compress(_VALUES, "0.5"), TypeError, "threshold", "float.*str"),
    ("two", lambda: functional.compress(_VALUES, torch.zeros(2)), ValueError, "threshold", r"one.*\(2,\)"),
    # --- decompress
    (
        "channels_last of a matrix",
        lambda: functional.decompress(functional.compress(torch.randn(3, 4), 0), channels_last=True),
        ValueError,
        "channels_last",
        r"4-D.*\(3, 4\)",
    ),
    # --- keep_count
    ("sparsity 1", lambda: functional.keep_count(10, 1.0), ValueError, "sparsity", r"\[0, 1\).*1.0"),
    ("sparsity below 0", lambda: functional.keep_count(10, -0.1), ValueError, "sparsity", r"\[0, 1\).*-0.1"),
    ("sparsity NaN", lambda: functional.keep_count(10, float("nan")), ValueError, "sparsity", r"\[0, 1\).*nan"),
    ("sparsity text", lambda: functional.keep_count(10, "0.9"), ValueError, "sparsity", r"\[0, 1\).*'0.9'"),
    ("numel", lambda: functional.keep_count(-1, 0.5), ValueError, "numel", "at least 0.*-1"),
    # --- conv2d: tensors
    ("input list", lambda: _conv2d(input=[[1.0]]), TypeError, "input", "Tensor.*list"),
    ("input 2-D", lambda: _conv2d(input=torch.randn(6, 5)), ValueError, "input", r"N, C, H, W.*\(6, 5\)"),
    ("input 5-D", lambda: _conv2d(input=torch.randn(1, 1, 6, 5, 5)), ValueError, "input", r"N, C, H, W.*\(1, 1, 6"),
    ("input half", lambda: _conv2d(input=torch.randn(2, 6, 5, 7).half()), TypeError, "bias", "float16.*float32"),
    ("channels", lambda: _conv2d(input=torch.randn(2, 5, 5, 7)), ValueError, "input", "6 channels.*got 5"),
    ("unbatched channels", lambda: _conv2d(input=torch.randn(3, 5, 7)), ValueError, "input", "6 channels.*got 3"),
    ("weight None", lambda: _conv2d(weight=None), TypeError, "weight", "Tensor.*NoneType"),
    ("weight 3-D", lambda: _conv2d(weight=torch.randn(4, 3, 3)), ValueError, "weight", r"kh, kw.*\(4, 3, 3\)"),
    ("weight dtype", lambda: _conv2d(weight=torch.randn(4, 3, 3, 3).double()), TypeError, "weight", "float32.*float64"),
    ("outputs", lambda: _conv2d(weight=torch.randn(5, 3, 3, 3), bias=None), ValueError, "weight", "groups = 2.*got 5"),
    ("no outputs", lambda: _conv2d(weight=torch.randn(0, 3, 3, 3), bias=None), ValueError, "weight", "got.*0"),
    ("kernel", lambda: _conv2d(weight=torch.randn(4, 3, 0, 3)), ValueError, "weight", r"1x1.*\(4, 3, 0, 3\)"),
    ("bias 2-D", lambda: _conv2d(bias=torch.randn(4, 1)), ValueError, "bias", r"\(4,\).*\(4, 1\)"),
    ("bias long", lambda: _conv2d(bias=torch.randn(5)), ValueError, "bias", r"\(4,\).*\(5,\)"),
    ("bias dtype", lambda: _conv2d(bias=torch.randn(4).double()), TypeError, "bias", "float32.*float64"),
    ("bias number", lambda: _conv2d(bias=1.0), TypeError, "bias", "Tensor.*float"),
    ("too small", lambda: _conv2d(input=torch.randn(2, 6, 2, 7)), ValueError, "input", "height of at least 3.*got 2"),
    ("too narrow", lambda: _conv2d(dilation=(1, 4)), ValueError, "input", "width of at least 9.*got 7"),
    ("no pixels", lambda: _conv2d(input=torch.randn(2, 6, 0, 7)), ValueError, "input", "height.*got 0"),
    # --- conv2d: numbers
    ("stride 0", lambda: _conv2d(stride=0), ValueError, "stride", "at least 1.*0"),
    ("stride below 0", lambda: _conv2d(stride=(1, -2)), ValueError, "stride", r"at least 1.*\(1, -2\)"),
    ("stride of three", lambda: _conv2d(stride=(1, 2, 3)), ValueError, "stride", r"two integers.*\(1, 2, 3\)"),
    ("stride float", lambda: _conv2d(stride=1.5), TypeError, "stride", "integer.*1.5"),
    ("stride floats", lambda: _conv2d(stride=(1, 1.5)), TypeError, "stride", "integer.*1.5"),
    ("stride text", lambda: _conv2d(stride="2"), TypeError, "stride", "integer.*'2'"),
    ("stride None", lambda: _conv2d(stride=None), TypeError, "stride", "integer.*None"),
    ("padding below 0", lambda: _conv2d(padding=-1), ValueError, "padding", "at least 0.*-1"),
    ("padding of three", lambda: _conv2d(padding=[0, 1, 2]), ValueError, "padding", r"two integers.*\[0, 1, 2\]"),
    ("padding name", lambda: _conv2d(padding="full"), ValueError, "padding", "'same', 'valid'.*'full'"),
    ("same, strided", lambda: _conv2d(padding="same", stride=2), ValueError, "padding", r"stride 1.*\(2, 2\)"),
    ("dilation 0", lambda: _conv2d(dilation=(0, 1)), ValueError, "dilation", r"at least 1.*\(0, 1\)"),
    ("dilation None", lambda: _conv2d(dilation=None), TypeError, "dilation", "integer.*None"),
    ("groups 0", lambda: _conv2d(groups=0), ValueError, "groups", "at least 1.*0"),
    ("groups float", lambda: _conv2d(groups=2.0), (TypeError, ValueError), "groups", "integer.*2.0"),
    # --- conv2d: thresholds
    ("weight_threshold", lambda: _conv2d(weight_threshold=-0.5), ValueError, "weight_threshold", "at least 0.*-0.5"),
    (
        "activation_threshold",
        lambda: _conv2d(activation_threshold=-0.5),
        ValueError,
        "activation_threshold",
        "at least 0.*-0.5",
    ),
    ("threshold None", lambda: _conv2d(weight_threshold=None), TypeError, "weight_threshold", "float.*NoneType"),
    (
        "thresholds of each channel",
        lambda: _conv2d(activation_threshold=torch.zeros(6)),
        ValueError,
        "activation_threshold",
        r"one.*\(6,\)",
    ),
    # --- conv2d_packed
    ("backend", lambda: _packed(backend="fast"), ValueError, "backend", "'dense', 'sparse'.*'fast'"),
    (
        "packed_weight of another size",
        lambda: _packed(packed_weight=functional.compress(torch.randn(4, 6, 3, 2), 0)),
        ValueError,
        "packed_weight",
        r"\(4, 6, 3, 3\).*\(4, 6, 3, 2\)",
    ),
    (
        "packed_input of another size",
        lambda: _packed(packed_input=functional.compress(torch.randn(2, 6, 7, 5), 0)),
        ValueError,
        "packed_input",
        r"\(2, 6, 5, 7\).*\(2, 6, 7, 5\)",
    ),
    (
        "packed_weight of another dtype",
        lambda: _packed(packed_weight=functional.compress(torch.randn(4, 6, 3, 3).double(), 0)),
        TypeError,
        "packed_weight",
        "float32.*float64",
    ),
    # --- linear
    ("input list", lambda: _linear(input=[1.0]), TypeError, "input", "Tensor.*list"),
    ("features", lambda: _linear(input=torch.randn(2, 5)), ValueError, "input", r"6.*\(2, 5\)"),
    ("a number", lambda: _linear(input=torch.tensor(1.0)), ValueError, "input", r"6.*\(\)"),
    ("weight 1-D", lambda: _linear(weight=torch.randn(6)), ValueError, "weight", r"out_features.*\(6,\)"),
    ("weight dtype", lambda: _linear(weight=torch.randn(4, 6).double()), TypeError, "weight", "float32.*float64"),
    ("bias long", lambda: _linear(bias=torch.randn(6)), ValueError, "bias", r"\(4,\).*\(6,\)"),
    ("input half", lambda: _linear(input=torch.randn(2, 6).half()), TypeError, "bias", "float16.*float32"),
    ("threshold", lambda: _linear(weight_threshold=-1), ValueError, "weight_threshold", "at least 0.*-1"),
]


@pytest.mark.parametrize(
    ("call", "error", "argument", "words"), [case[1:] for case in _CASES], ids=[c[0] for c in _CASES]
)
def test_message(call: Callable[[], Any], error: type[Exception], argument: str, words: str) -> None:
    with pytest.raises(error, match=f"(?s)^{argument}: .*{words}") as caught:
        call()
    assert len(str(caught.value)) < 250, "one readable sentence"


def test_messages_do_not_name_the_folder_of_the_build() -> None:
    with pytest.raises(RuntimeError, match=r"csrc/ops/.*k: expected") as refused:
        torch.ops.swat_ext.kth_magnitude(_VALUES, 101)
    assert str(Path(__file__).resolve().parents[1]) not in str(refused.value)


def test_a_threshold_of_nan_elements_is_taken() -> None:
    values = torch.tensor([1.0, torch.nan, -2.0])
    packed = functional.compress(values, functional.kth_magnitude(values, 1))
    assert packed.values.numel() == 3


def test_weight_gradient_without_a_packed_input() -> None:
    weight = torch.randn(4, 6, 3, 3, requires_grad=True)
    output = _packed(weight=weight, packed_input=None)
    with pytest.raises(RuntimeError, match=r"^packed_input: the gradient of weight needs it"):
        output.sum().backward()


# --- Packed tensors that do not go together


def _made(**changes: Any) -> functional.Packed:
    """1000 elements packed, with parts changed."""
    return functional.compress(torch.randn(1000), 0.5)._replace(**changes)


_INCONSISTENT: dict[str, Callable[[], functional.Packed]] = {
    "another size": lambda: _made(size=torch.Size((1030,))),
    "a size below 0": lambda: _made(size=torch.Size((-1000,))),
    "two sizes below 0": lambda: _made(size=torch.Size((-10, -100))),
    "a size that wraps": lambda: _made(size=torch.Size((2**33, 2**33))),
    "values too few": lambda: _made(values=torch.randn(3)),
    "values of integers": lambda: _made(values=torch.ones(1000, dtype=torch.int64)),
    "values of two dimensions": lambda: _made(values=torch.randn(2, 500)),
    "values on meta": lambda: _made(values=torch.randn(1000, device="meta")),
    "a mask of int32": lambda: _made(mask=torch.zeros(17, dtype=torch.int32)),
    "a mask too short": lambda: _made(mask=torch.zeros(16, dtype=torch.int64)),
    "ranks that disagree": lambda: _made(mask=torch.full((17,), 5, dtype=torch.int64)),
    "bits past the end": lambda: functional.Packed(
        torch.randn(64), torch.tensor([-1, 0], dtype=torch.int64), torch.Size((10,))
    ),
}


@pytest.mark.parametrize("name", _INCONSISTENT)
def test_an_inconsistent_packed_tensor_is_refused(name: str, isa: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"packed|values|mask|size"):
        functional.decompress(_INCONSISTENT[name]())


@pytest.mark.parametrize("packed", [None, torch.randn(3), (1, 2, 3)])
def test_what_is_not_packed_is_refused(packed: Any) -> None:
    with pytest.raises(TypeError, match=r"^packed: expected a Packed, got"):
        functional.decompress(packed)
    for name in ("packed_weight", "packed_input"):
        if packed is not None or name == "packed_weight":
            with pytest.raises(TypeError, match=rf"^{name}: expected a Packed, got"):
                _packed(**{name: packed})
