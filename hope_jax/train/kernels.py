"""Whether the kernels that were asked for are in the program: a loop never takes their place unseen."""

from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from hope_jax.context.schedule import learns_in_context
from hope_jax.errors import UserError
from hope_jax.memory.kernels import what_runs
from hope_jax.models import LanguageModel, ModelConfig, impls
from hope_jax.train.step import LossFn


def evaluated(config: ModelConfig, platform: str) -> str:
    """What runs the memories of a model on a platform, in words."""
    return ", ".join(sorted({what_runs(impl, platform) for impl in impls(config)})) or "none"


def check_kernels(model: LanguageModel, loss: LossFn, params: Any, batch: Any, remat_every: int | None) -> None:
    """Raise UserError where memories are to run in kernels, and the loss of such a batch has none.

    ``params``, ``batch``: shapes will do; the loss is traced where ``impl`` is "pallas".
    """
    if "pallas" not in impls(model.config) or has_kernel(jax.make_jaxpr(loss)(params, batch).jaxpr):
        return
    what = f"{batch.shape[1] - 1} tokens are no whole periods of the memories"
    if remat_every is not None:
        what = f"--remat-every {remat_every} reads a sequence in pieces"
    elif learns_in_context(model):
        what = "levels that learn in context read a sequence in pieces"
    raise UserError(f"impl='pallas' runs no kernel here: {what}. Change that, or use impl='auto'.")


def has_kernel(program: Any) -> bool:
    """Whether a jaxpr starts a kernel."""
    inner = (part for equation in program.eqns for part in jaxprs_in_params(equation.params))
    return any(equation.primitive.name == "pallas_call" for equation in program.eqns) or any(map(has_kernel, inner))
