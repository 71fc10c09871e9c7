"""Rows of the named architectures as cases of a test: a new row is fast, the known ones are slow but for some."""

from collections.abc import Iterable
from typing import Any

import pytest

from hope_jax.models import ARCHITECTURES

# What a mixer does is tested where its layer is; the blocks around it are the same for all.
KNOWN = """
hope hope_attention hope_tnt transformer_pp transformer_conv titans titans_linear titans_mac titans_mag titans_mal
titans_tnt memory_caching deltanet deltanet_negative gated_deltanet comba linear_attention retnet mamba2 samba gdn_h1
ttt_linear ttt_mlp ttt_e2e rwkv7 dla yaad moneta memora oja omega lstm srwm
"""


def rows(*fast: str, of: Iterable[str] = ARCHITECTURES) -> list[Any]:
    """One case for each name in ``of``, those that are known and not in ``fast`` marked slow."""
    slow = {*KNOWN.split()} - {*fast}
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in of]
