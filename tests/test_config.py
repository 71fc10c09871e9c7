"""Configurations come back from JSON equal to what they were, and damaged ones are refused with the field named."""

import copy
import dataclasses
import enum
import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import MODELS
from hope_jax.cli.pretrain import PretrainConfig
from hope_jax.config import check_same, flatten, flatten_json, from_json, to_json
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.memory import RULES, objectives
from hope_jax.models import with_in_context
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.optim import AdamW
from hope_jax.train import OptimizerConfig, TextRun

TINY = MODELS["hope-tiny"]
RUN = TextRun(TINY, OptimizerConfig(), 4, 512, 0, "a", "b")
ROWS = {
    **MODELS,
    **RULES,
    "in context": with_in_context(TINY, (64, 256), writes=Writes(bptt=(None, 2))),
    "optimizer": OptimizerConfig(AdamW(b1=0.5)),
    "pretrain": PretrainConfig(Path("runs/x"), resume_from=3),
    "run": RUN,
}


def back(config: Any, expected: Any = Any, trusted: tuple[str, ...] = ("hope_jax",)) -> Any:
    """Through the text of a file."""
    return from_json(json.loads(json.dumps(to_json(config), allow_nan=False)), expected, trusted)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_comes_back_equal(name):
    assert back(ROWS[name], type(ROWS[name])) == ROWS[name]


class Colour(enum.Enum):
    """A choice."""

    RED = 1


class Pair(NamedTuple):
    """Two numbers."""

    left: int
    right: float


@dataclasses.dataclass(frozen=True)
class Everything:
    """A value of every kind."""

    nothing: None
    choice: Literal["a", "b"]
    colour: Colour
    pair: Pair
    where: Path
    dtype: Any
    activation: Any
    optimizer: Any
    nested: tuple[tuple[int, ...], ...]
    maybe: float | None
    named: dict[str, Any]


EVERYTHING = Everything(
    nothing=None,
    choice="b",
    colour=Colour.RED,
    pair=Pair(1, float("inf")),
    where=Path("späß/[0.1]"),
    dtype=np.dtype("bfloat16"),
    activation=jax.nn.silu,
    optimizer=functools.partial(optax.adam, 1e-3, b1=0.5),
    nested=((1, 2), ()),
    maybe=2.0,
    named={"rule": RULES["hope"]},
)


def same(left: Everything, right: Everything) -> bool:
    """Equal, where two partials are equal that call the same function with the same arguments."""
    one, other = left.optimizer, right.optimizer
    partials = (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return partials and dataclasses.replace(left, optimizer=None) == dataclasses.replace(right, optimizer=None)


def test_a_configuration_of_your_own_comes_back_equal_where_its_package_is_trusted():
    trusted = ("hope_jax", __name__.split(".", maxsplit=1)[0])
    assert same(back(EVERYTHING, Everything, trusted), EVERYTHING)
    with pytest.raises(UserError, match="only what belongs to hope_jax may be read"):
        back(EVERYTHING)


def test_a_type_of_scalars_comes_back_as_its_dtype_and_a_whole_number_as_a_float_where_one_is_declared():
    assert back(dataclasses.replace(TINY, dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    rate = back(OptimizerConfig(learning_rate=1)).learning_rate  # pyright: ignore[reportArgumentType]
    assert isinstance(rate, float) and rate == 1.0


@pytest.mark.parametrize("value", [lambda x: x, [1, 2], object(), {1: 2}, np.zeros(2)])
def test_what_json_cannot_stand_for_is_refused_when_it_is_written(value):
    with pytest.raises(UserError, match="optimizer"):
        to_json(dataclasses.replace(EVERYTHING, optimizer=value))


def changed(path: str, value: Any) -> Any:
    """The JSON of ``RUN`` with another value at a dotted place; ``...`` leaves it out."""
    data = copy.deepcopy(to_json(RUN))
    *way, last = path.split(".")
    place = functools.reduce(lambda inner, name: inner[name], way, data)
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.width", "192", "model.width is '192'; expected int"),
        ("model.width", True, "model.width is True; expected int"),
        ("model.width", None, "model.width is None; expected int"),
        ("model.width", 0, "model is not valid: width is 0"),
        ("model.widht", 3, "model.widht is no field of ModelConfig; did you mean 'width'"),
        ("model.width", ..., "model.width is missing"),
        ("model.mixer", {"class": "hope_jax.levels:Level", "period": 3}, "model.mixer is Level.*; expected PartConfig"),
        ("model.mixer.read", "never", "model.mixer.read is 'never'; expected one of 'before', 'after'"),
        ("model.mixer.memory.scales", [1.0, "2"], "model.mixer.memory.scales.1 is '2'; expected float"),
        ("model.mixer.objective", {"function": "hope_jax.memory.objectives:l3"}, "does not exist in this version"),
        ("model.mixer.objective", {"function": "os:system"}, "model.mixer.objective names 'os:system'; only what"),
        ("model.mixer.objective", {"function": "hope_jax.storage.digests:os.system"}, "does not exist"),
        ("model.mixer.objective", {"function": "hope_jax.storage.digests:os"}, "does not exist"),
        ("model.mixer.objective", {"function": "hope_jax.memory.objectives:l2", "arguments": 3}, "expected a list"),
        ("model.mixer.objective", {"function": 3}, "names 3"),
        ("model.mixer.objective", 3, "model.mixer.objective is 3; expected"),
        ("model.feed_forward.levels", [3], "model.feed_forward.levels.0 is 3; expected Level"),
        ("model.dtype", {"dtype": "float33"}, "model.dtype is 'float33'; expected a dtype"),
        ("model.dtype", {}, "model.dtype has the entries"),
        ("optimizer.learning_rate", -1.0, "optimizer is not valid: .*learning_rate is -1"),
        ("class", "hope_jax.models:MODELS", "the configuration names 'hope_jax.models:MODELS'"),
    ],
)
def test_a_damaged_configuration_is_refused_with_the_field_named(path, value, said):
    with pytest.raises(UserError, match=said):
        from_json(changed(path, value), TextRun)


@pytest.mark.parametrize("name", ["BLUE", [], None])
def test_a_member_that_there_is_not_is_refused(name):
    data = to_json(EVERYTHING)
    data["colour"]["name"] = name
    with pytest.raises(UserError, match="colour is .*; expected a member of"):
        from_json(data, trusted=("hope_jax", Colour.__module__))


@pytest.mark.parametrize("data", [None, 3, "text", [], {}, {"mapping": 3}])
def test_what_is_no_configuration_at_all_is_refused(data):
    with pytest.raises(UserError, match="the configuration"):
        from_json(data, TextRun)


def test_what_is_inside_is_named_with_dots_and_the_same_from_an_object_and_from_its_json():
    flat = flatten(RUN)
    assert flat == flatten_json(to_json(RUN))
    found = {
        name: flat[name] for name in ("model.mixer.objective", "model.dtype", "model.feed_forward.levels.1.period")
    }
    assert list(found.values()) == ["hope_jax.memory.objectives:l2", "float32", 8192]
    assert flat["model.mixer"] == "hope_jax.nn.mixers.self_modifying:SelfModifyingConfig" and "" not in flat


def test_two_models_are_told_apart_by_each_field_and_by_the_class_of_their_parts():
    other = dataclasses.replace(
        TINY,
        mixer=dataclasses.replace(TINY.mixer, objective=objectives.dot),
        feed_forward=dataclasses.replace(TINY.feed_forward, levels=(Level(2048), Level(4096))),
    )
    with pytest.raises(UserError) as caught:
        check_same(flatten(TINY), flatten(other), Path("runs/x"))
    for said in (
        "objectives:l2 there and hope_jax.memory.objectives:dot here",
        "levels.1.period is 8192 there and 4096",
    ):
        assert said in str(caught.value)
    assert str(caught.value).count(" there and ") == 2
    with pytest.raises(UserError, match="mixer is .*SelfModifyingConfig there and .*AttentionConfig here"):
        check_same(flatten(TINY), flatten(MODELS["hope_attention-tiny"]), Path("runs/x"))
