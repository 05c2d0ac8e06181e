"""SWATConfig: what it takes, what it refuses and how it says so."""

import dataclasses
import pickle

import pytest

from swat_ext import SWATConfig


def test_defaults_are_the_documented_ones():
    config = SWATConfig(sparsity=0.9)
    assert dataclasses.asdict(config) == {
        "sparsity": 0.9,
        "activation_sparsity": None,
        "distribution": "uniform",
        "granularity": "unstructured",
        "topk_period": 10,
        "skip": None,
        "batchnorm": "exact",
        "backend": "auto",
    }


def test_is_immutable_hashable_and_picklable():
    config = SWATConfig(0.5, skip=["fc", "layer1.*"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.6
    assert config.skip == ("fc", "layer1.*")
    assert hash(config) == hash(SWATConfig(0.5, skip=("fc", "layer1.*")))
    assert pickle.loads(pickle.dumps(config)) == config


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


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_wrong_period_is_refused(value, error):
    with pytest.raises(error, match=r"^topk_period: expected an integer of at least 1"):
        SWATConfig(0.5, topk_period=value)


@pytest.mark.parametrize(
    ("name", "value", "available"),
    [
        ("distribution", "erk", "uniform"),
        ("distribution", "momentum", "uniform"),
        ("granularity", "kernel", "unstructured"),
        ("granularity", "filter", "unstructured"),
        ("granularity", "block", "unstructured"),
    ],
)
def test_what_is_not_there_yet_says_what_is(name, value, available):
    with pytest.raises(NotImplementedError, match=rf"^{name}: '{value}' is not implemented yet; .* '{available}'$"):
        SWATConfig(0.5, **{name: value})


@pytest.mark.parametrize("name", ["distribution", "granularity", "batchnorm", "backend"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected one of '.*', got 'other'$"):
        SWATConfig(0.5, **{name: "other"})


@pytest.mark.parametrize("skip", ["fc", b"fc", 3, {"fc"}, ["fc", 1]])
def test_skip_must_be_a_sequence_of_patterns(skip):
    with pytest.raises(TypeError, match=r"^skip: expected"):
        SWATConfig(0.5, skip=skip)
