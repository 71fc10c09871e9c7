"""Model FLOPs: the arithmetic of a model's matrix products, counted in the program that computes them.

A product of matrices [m, k] and [k, n] counts 2 m n k, a multiplication and an addition for each term; a convolution
counts alike. The program is that of the forward pass, so the count can never describe another model: chunks of
memories count with their inverses and inner gradients, and what a causal mask hides counts where it is computed.

A training step counts as three forward passes, because the gradient of a product is two products of its size. Not
counted: elementwise work, sums and gathers, the optimizer, and what rematerialisation of blocks computes a second time.
Where a model learns in context, its loss has gradients in it, and what memories recompute for those counts. Divided by
the time of a step and by the peak of the devices this is the model FLOPs utilisation (Chowdhery et al. 2022, PaLM,
Appendix B).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from hope_jax.models import LanguageModel, ModelConfig
from hope_jax.train.step import LossFn, abstract_params, next_token_loss

PASSES = 3  # forward passes that a training step counts as
# Products in bfloat16 per second, dense, of one device whose kind has these words in its name; the first row counts.
# None: not known. Google Cloud's pages of the TPU versions ("peak compute per chip"), NVIDIA's data sheets (half of
# "with sparsity").
PEAKS = {
    "TPU v4 lite": None,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
    "MIG": None,  # a part of a card
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": None,
    "H200": 989e12,
}


def program_flops(program: Any) -> int:
    """FLOPs of the products and convolutions of a jaxpr, recomputation in it included.

    A scan counts as often as it runs, a Pallas kernel once for each cell of its grid, and what devices compute in parts
    once for each part. Of the branches of a condition, and of the forms for several platforms, the largest counts. A
    ``while`` loop counts once: how often it runs is not known before.
    """
    return sum(map(_of_equation, program.eqns))


def _of_equation(equation: Any) -> int:
    kind, params = equation.primitive.name, equation.params
    if kind == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted) * _size(equation)
    if kind == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return 2 * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]] * _size(equation)
    parts = [program_flops(inner) for inner in jaxprs_in_params(params)]
    return max(parts) if kind == "cond" else _rounds(kind, params) * sum(parts)


def _size(equation: Any) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _rounds(kind: str, params: Any) -> int:
    """How often the programs inside an equation run."""
    if kind == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if kind == "shard_map":  # inside is the part of one device
        axes = {axis for spec in (*params["in_specs"], *params["out_specs"]) for axis in _named(spec)}
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return params["length"] if kind == "scan" else 1


def _named(spec: Any) -> list[str]:
    """The axes of a mesh that a specification of a placement names."""
    return [axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part)]


def forward_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of the products of a function; its arguments may be shapes alone. Nothing is computed."""
    return program_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def model_flops(loss: LossFn, params: Any, batch: Any) -> int:
    """Model FLOPs of a training step on ``batch``; it and ``params`` may be shapes alone."""
    return PASSES * forward_flops(loss, params, batch)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of training a language model of any architecture, per token of sequences of ``length`` tokens."""
    model = LanguageModel(config)
    loss = next_token_loss(model, np.ones(config.vocab_size))
    window = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
    return model_flops(loss, abstract_params(model), window) / length


def peak_flops(kind: str) -> float | None:
    """Products in bfloat16 per second of one device of that kind, as JAX names it; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in kind), None)
