"""A check that a program has the kernels that were asked for: no loop replaces them without a word."""

from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from hope_jax.context.schedule import learns_in_context
from hope_jax.errors import UserError
from hope_jax.memory.kernels import runs_kernel, what_runs
from hope_jax.models import LanguageModel, ModelConfig, impls
from hope_jax.train.step import LossFn


def evaluated(config: ModelConfig, platform: str) -> str:
    """How the memories of a model are computed on a platform, in words."""
    return ", ".join(sorted({what_runs(impl, platform) for impl in impls(config)})) or "none"


def check_kernels(model: LanguageModel, loss: LossFn, params: Any, batch: Any, remat_every: int | None) -> None:
    """Raise UserError where memories are to run in kernels, and no kernel reads the tokens of such a batch.

    Kernels that read persistent vectors before the first token do not count. ``params``, ``batch``: arrays or
    their shapes; the loss is traced where ``impl`` asks for kernels.
    """
    kernels = list(filter(runs_kernel, impls(model.config)))
    if not kernels:
        return
    before = jax.make_jaxpr(lambda params: model.init_state(params, *batch.shape))(params)
    if count_kernels(jax.make_jaxpr(loss)(params, batch).jaxpr) > count_kernels(before.jaxpr):
        return
    what = f"{batch.shape[1] - 1} tokens are no whole periods of the memories"
    if remat_every is not None:
        what = f"--remat-every {remat_every} reads a sequence in pieces"
    elif learns_in_context(model):
        what = "levels that learn in context read a sequence in pieces"
    raise UserError(f"impl={kernels[0]!r} runs no kernel here: {what}. Change that, or use impl='auto'.")


def count_kernels(program: Any) -> int:
    """How many equations of a jaxpr start a kernel."""
    inner = (part for equation in program.eqns for part in jaxprs_in_params(equation.params))
    here = sum(equation.primitive.name == "pallas_call" for equation in program.eqns)
    return here + sum(map(count_kernels, inner))
