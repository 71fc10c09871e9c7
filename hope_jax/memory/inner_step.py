"""What a rule writes: one gradient step of the inner objective per token, layer by layer (SPEC 1.3, 1.4)."""

from typing import NamedTuple

import jax.numpy as jnp

from hope_jax.memory import objectives
from hope_jax.memory.architectures import Weights
from hope_jax.memory.kernels import Products
from hope_jax.memory.rule import Gates, Rule
from hope_jax.types import Array, Float


class LayerWrite(NamedTuple):
    """What the inner gradient steps of T tokens do to one layer: w_t against k_t, and the erase (None: none).

    ``output`` is the anchor's layer applied to the keys (None: there is no anchor).
    """

    keys: Float[Array, "T K"]
    writes: Float[Array, "T V"]
    erase: Float[Array, " T"] | None
    output: Float[Array, "T V"] | None = None


def layer_writes(
    rule: Rule,
    products: Products,
    later: Weights,
    pairs: tuple[Array, Array],
    first: tuple[Array, Array | None],
    gates: Gates,
) -> list[LayerWrite]:
    """The write of every layer at the anchor (SPEC 1.4).

    ``pairs`` are keys [T,K] and values [T,V], ``first`` the first layer of the anchor applied to them (to the values
    only with ``self_values``), ``later`` the anchor's layers after it.
    """
    (keys, values), architecture = pairs, rule.architecture
    through = architecture.forward(first[0], later, products)
    if first[1] is not None:
        values = architecture.finish(first[1], later, values, products)
    prediction = through.outputs[-1] + keys if architecture.residual else through.outputs[-1]
    errors = [objectives.error(rule.objective, prediction, values)]
    for w, back in zip(later[::-1], through.backs[::-1], strict=True):
        errors.insert(0, back(products.matmul_nt(errors[0], w))[0])
    layers = enumerate(zip([keys, *through.inputs], errors, through.outputs, strict=True))
    return [layer_write(rule, i, z, error, gates)._replace(output=output) for i, (z, error, output) in layers]


def layer_write(rule: Rule, layer: int, z: Array, error: Array, gates: Gates) -> LayerWrite:
    """From the layer's input z and the inner gradient at its output (without an anchor: less the memory's own part)."""
    rate, erase = _rates(rule, layer, z, gates)
    if rule.momentum and rule.damped and gates.momentum_decay is not None:
        rate = rate * (1 - gates.momentum_decay)
    return LayerWrite(z, -rate[:, None] * error, erase)


def _rates(rule: Rule, layer: int, z: Array, gates: Gates) -> tuple[Array, Array | None]:
    """Write rate and erase of one layer (None: no erase)."""
    if rule.gradient_at != "anchor":
        erase = gates.rate * gates.retention if rule.gradient_at == "retained" else gates.rate
        return gates.rate, erase if rule.objective is objectives.l2 else None
    if rule.dgd_scope == "none" or (rule.dgd_scope == "input_only" and layer > 0):
        return gates.rate, None
    if rule.rate_form == "literal":
        return gates.rate, gates.rate
    rate = gates.rate / (1 + gates.rate * jnp.sum(jnp.square(z), axis=-1))
    return rate, rate
