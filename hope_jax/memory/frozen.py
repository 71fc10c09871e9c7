"""A memory that is read at its anchor and keeps everything: its writes in a period are a sum, added at the end.

``Rule`` with ``read="anchor"``, without erase, momentum and retention: nothing depends on the running weights before
the anchor moves to them. So a period is one product per layer, however long, where ``scan.scan`` takes it in blocks.
"""

import math

import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import Active, Due, scan_levels
from hope_jax.memory.kernels import Impl, products_of
from hope_jax.memory.rule import Fast, Gates, Rule, layer_writes
from hope_jax.memory.scan import idle, refreshed
from hope_jax.types import Array, Count, Float, Int

_GRID = 64
"""Tokens of a step where it is not known whether whole periods come."""


def scan_frozen(
    rule: Rule,
    fast: Fast,
    tokens: tuple[Float[Array, "T K"], Float[Array, "T V"], Float[Array, "T K"], Float[Array, " T"]],
    position: Int[Array, ""] | np.ndarray,
    impl: Impl = "auto",
    count: Count = None,
) -> tuple[Fast, Float[Array, "T V"]]:
    """Read and write T tokens (keys, values, queries, inner rates); returns the fast weights, and the reads.

    V_{n+1} = V_n - sum of rate_t grad(V_n; k_t, v_t) over the tokens of period n, and y_t = V_n(q_t). ``position`` and
    ``count`` are those of ``scan.scan``. Raises UserError for a rule that does not read at its anchor, or that forgets.
    """
    if (rule.read, rule.gradient_at, rule.dgd_scope, rule.momentum) != ("anchor", "anchor", "none", False):
        raise UserError("a frozen memory needs read='anchor', gradient_at='anchor', dgd_scope='none', momentum=False")
    known = isinstance(position, np.ndarray) and count is None
    grid = max(math.gcd(rule.period, _GRID), math.gcd(rule.period, len(tokens[0])) if known else 1)
    products = products_of(impl)

    def run_chunk(fast: Fast, tokens: tuple[Array, ...], active: Active, due: tuple[Due, ...]):
        (keys, values, queries, rate), fast = tokens, refreshed(rule, fast, due[1])
        first, later = fast.anchor[0], fast.anchor[1:]
        gates = idle(Gates(rate, jnp.ones_like(rate), None), active)
        writes = layer_writes(rule, products, later, (keys, values), (products.matmul(keys, first), None), gates)
        added = [products.matmul_tn(one.keys, one.writes) for one in writes]
        running = tuple(w + more for w, more in zip(fast.running, added, strict=True))
        return fast._replace(running=running), rule.architecture.apply(fast.anchor, queries, products)

    return scan_levels(run_chunk, fast, tokens, position=position, periods=(grid, rule.period), count=count)
