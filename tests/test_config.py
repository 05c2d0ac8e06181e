"""SWATConfig: what it takes, what it refuses and how it says so."""

import dataclasses
import pickle
import re

import pytest

from swat_ext import SWATConfig
from swat_ext.topology import METHODS, SET, Method, RigL


def test_defaults_are_the_documented_ones():
    config = SWATConfig(sparsity=0.9)
    assert dataclasses.asdict(config) == {
        "sparsity": 0.9,
        "activation_sparsity": None,
        "method": "swat",
        "distribution": "uniform",
        "granularity": "unstructured",
        "block_size": (8, 1),
        "topk_period": 10,
        "weight_topk_period": 1,
        "skip": None,
        "batchnorm": "exact",
        "backend": "auto",
    }


def test_is_immutable_hashable_and_picklable():
    config = SWATConfig(0.5, skip=["fc", "layer1.*"], method=SET(seed=3), granularity="block", block_size=[4, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.6
    assert config.skip == ("fc", "layer1.*")
    assert config.block_size == (4, 2)
    twin = SWATConfig(0.5, skip=("fc", "layer1.*"), method=SET(seed=3), granularity="block", block_size=(4, 2))
    assert config == twin
    assert hash(config) == hash(twin)
    assert config != dataclasses.replace(twin, method=SET(seed=4))
    assert pickle.loads(pickle.dumps(config)) == config


def test_sparsities_alone_may_be_given_by_position():
    assert SWATConfig(0.5, 0.25).activation_sparsity == 0.25
    with pytest.raises(TypeError, match="positional argument"):
        SWATConfig(0.5, 0.25, "swat")


@pytest.mark.parametrize("name", ["sparsity", "activation_sparsity"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 2, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a number in \[0, 1\).* got {value!r}$"):
        SWATConfig(**{"sparsity": 0.5, name: value})


@pytest.mark.parametrize("name", ["sparsity", "activation_sparsity"])
@pytest.mark.parametrize("value", ["0.5", True, [0.5]])
def test_a_sparsity_that_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a number"):
        SWATConfig(**{"sparsity": 0.5, name: value})


@pytest.mark.parametrize("value", [0, 0.0, 0.999])
def test_the_ends_of_the_range_are_taken(value):
    assert SWATConfig(value, activation_sparsity=value).sparsity == value


@pytest.mark.parametrize("name", ["topk_period", "weight_topk_period"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("3", TypeError), (None, TypeError)],
)
def test_a_wrong_period_is_refused(name, value, error):
    with pytest.raises(error, match=rf"^{name}: expected an integer of at least 1, in optimizer steps, got {value!r}$"):
        SWATConfig(0.5, **{name: value})
    assert getattr(SWATConfig(0.5, **{name: 7}), name) == 7


NAMES = {
    "method": ("swat", "static", "set", "rigl"),
    "distribution": ("uniform", "erk", "momentum"),
    "granularity": ("unstructured", "kernel", "filter", "block"),
    "batchnorm": ("exact", "bf16", "int8"),
    "backend": ("auto", "sparse", "dense"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NAMES.items() for value in values])
def test_every_name_is_taken(name, value):
    assert getattr(SWATConfig(0.5, **{name: value}), name) == value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["other", "", "Swat", None, 1, ["swat"]])
def test_an_unknown_name_lists_the_known_ones(name, value):
    known = ", ".join(map(repr, NAMES[name]))
    with pytest.raises(ValueError, match=rf"^{name}: expected one of {known}( or a .*Method)?, got ") as refused:
        SWATConfig(0.5, **{name: value})
    assert str(refused.value).endswith(f"got {value!r}")


def test_a_method_may_be_one_of_ones_own():
    class Mine(Method):
        """Moves nothing."""

    for method in (RigL(update_period=7), Mine()):
        assert SWATConfig(0.5, method=method).method is method
    assert list(METHODS) == list(NAMES["method"])
    for wrong in (RigL, Mine, Method):
        with pytest.raises(
            ValueError, match=r"^method: expected one of 'swat', .* or a swat_ext\.topology\.Method, got "
        ):
            SWATConfig(0.5, method=wrong)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("update_period", (0, -3), "at least 1, in optimizer steps"),
        ("fraction", (-0.1, 1, 1.5, float("nan")), r"a number in \[0, 1\)"),
        ("until", (0, -1, 1.1, float("nan")), r"a number in \(0, 1\]"),
    ],
)
def test_a_method_out_of_its_range_is_refused(name, values, expected):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: expected {expected}, got {value}$"):
            RigL(**{name: value})
    assert RigL(update_period=1, fraction=0, until=1).fraction == 0


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("update_period", (2.0, True, "2", None), "an integer"),
        ("seed", (1.0, False, "1", None), "an integer"),
        ("fraction", (True, "0.3", None, [0.3]), "a number"),
        ("until", (True, "0.3", None, 1j), "a number"),
    ],
)
def test_a_method_of_other_types_is_refused(name, values, expected):
    for kind in (Method, RigL):
        for value in values:
            with pytest.raises(TypeError, match=rf"^{name}: expected {expected}, got {re.escape(repr(value))}$"):
                kind(**{name: value})
    assert Method(seed=-1).seed == -1


@pytest.mark.parametrize("method", ["static", "set", "rigl", RigL(fraction=0.5)])
def test_momentum_shares_no_budget_of_a_method_that_holds_a_pattern(method):
    with pytest.raises(ValueError, match=r"^distribution: expected 'uniform' or 'erk' for method .*, got 'momentum'$"):
        SWATConfig(0.5, method=method, distribution="momentum")
    for distribution in ("uniform", "erk"):
        assert SWATConfig(0.5, method=method, distribution=distribution).method == method
    assert SWATConfig(0.5, method="swat", distribution="momentum").distribution == "momentum"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ((0, 1), ValueError),
        ((8, -1), ValueError),
        ((8, 0), ValueError),
        ((8,), TypeError),
        ((8, 1, 1), TypeError),
        (8, TypeError),
        (None, TypeError),
        ("81", TypeError),
        (b"81", TypeError),
        ((8.0, 1), TypeError),
        ((8, True), TypeError),
        ({8, 1}, TypeError),
    ],
)
def test_a_wrong_block_size_is_refused(value, error):
    message = r"^block_size: expected \(output channels, input channels\), integers of at least 1, got "
    for granularity in ("block", "unstructured"):
        with pytest.raises(error, match=message):
            SWATConfig(0.5, granularity=granularity, block_size=value)


@pytest.mark.parametrize("value", [(1, 1), [4, 2], (1, 10**6)])
def test_a_block_may_have_any_sides(value):
    assert SWATConfig(0.5, granularity="block", block_size=value).block_size == tuple(value)


@pytest.mark.parametrize("skip", ["fc", b"fc", 3, {"fc"}, ["fc", 1]])
def test_skip_must_be_a_sequence_of_patterns(skip):
    with pytest.raises(TypeError, match=r"^skip: expected"):
        SWATConfig(0.5, skip=skip)
