"""Names of models and architectures: with a period behind @, one for each model, and what is said of unknown ones."""

import contextlib
import re
from typing import Any

import pytest
from test_models import SMALL

from hope_jax.errors import UserError
from hope_jax.models import ARCHITECTURES, MODELS, SIZES, WITH_PERIOD, model_named, row_named, with_period


def test_an_unknown_model_names_the_closest_ones_then_architectures_and_sizes():
    assert model_named("hope-tiny") is MODELS["hope-tiny"]
    with pytest.raises(UserError, match=r"mean .*'transformer_pp-tiny'.*\? Architectures: hope, .*; sizes: tiny, "):
        model_named("transformer-tiny")
    with pytest.raises(UserError, match="names are ARCHITECTURE-SIZE") as error:
        model_named("xyz")
    assert all(name in str(error.value) for name in (*ARCHITECTURES, *SIZES))
    assert "hope_tnt-" not in str(error.value)


def test_a_name_may_tell_the_anchor_period():
    tiny, named = MODELS["hope-tiny"], model_named("hope@64-tiny")
    mixer: Any = named.mixer
    tnt: Any = model_named("hope_tnt@32-tiny").mixer
    assert (mixer.c_memory, mixer.c_projections, tnt.local.c_memory) == (64, 64, 32)
    assert named == with_period(tiny, 64) != tiny == with_period(named, 16)
    assert row_named("hope@64")(SMALL) == with_period(row_named("hope")(SMALL), 64)


WRONG_PERIODS = {
    "hope@-tiny": "after @ stands the anchor period in tokens, as in hope@64; got ''",
    "hope@1.5-tiny": "got '1.5'",
    "hope@0-tiny": "got '0'",
    "hope@064-tiny": "after @ stands the anchor period in tokens, as in hope@64; got '064'",
    "hope@\u0666\u0664-tiny": "got '\u0666\u0664'",
    f"hope@{'9' * 5000}-tiny": "as in hope@64; got '999",
    "hope-tiny@64": "no model is called 'hope-tiny@64'; did you mean 'hope@64-tiny'",
    "hope@64": "no model is called 'hope@64'; did you mean 'hope@64-30m' or 'hope@64-tiny'",
    "hope@16-tiny": "the anchor period is 16 without @16, too; leave that out of the name",
    "hope@2049-tiny": "period is 2049; give at most the 2048 tokens of the model's context",
    "hope_tnt@48-tiny": "shard is 256; expected a multiple of the anchor period, 48",
    "titans@64-tiny": "the mixers are MemoryMixerConfig; only hope and hope_tnt have an anchor period",
    "hop@64-tiny": "no model is called 'hop@64-tiny'; did you mean 'hope@64-tiny'",
}
WRONG_PERIODS_OF_ROWS = {
    "hop@64": "No architecture is called 'hop@64'; did you mean 'hope@64' or 'hope_tnt@64'?",
    "hope@16": "the anchor period is 16 without @16, too",
    "hope@65": "period is 65; give at most the 64 tokens of the model's context",
    "hope@": "after @ stands the anchor period in tokens, as in hope@64; got ''",
}


@pytest.mark.parametrize(("name", "message"), WRONG_PERIODS.items(), ids=[name[:16] for name in WRONG_PERIODS])
def test_periods_that_cannot_be_are_refused(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model_named(name)


@pytest.mark.parametrize(("name", "message"), WRONG_PERIODS_OF_ROWS.items(), ids=WRONG_PERIODS_OF_ROWS)
def test_so_are_those_of_architectures(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        row_named(name)(SMALL)


def test_the_architectures_with_a_period_are_known():
    periodic = []
    for name, row in ARCHITECTURES.items():
        with contextlib.suppress(UserError):
            with_period(row(SMALL), 1)
            periodic.append(name)
    assert tuple(periodic) == WITH_PERIOD
