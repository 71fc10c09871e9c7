"""Memory or time: what the backward pass keeps, and what it computes a second time. Numbers change by rounding alone.

The memories always compute their chunks a second time (``levels.scan_levels``). Beyond that there are these choices::

    remat = "block"            of every block its input is kept; memory for one block at a time
    remat = "nested"           so, too; and of that block the states of its memories before every few chunks
    remat_every = N            of every N tokens the state before them is kept; memory for N tokens
    remat_states = "bfloat16"  the states before chunks, and before pieces of N tokens, are kept rounded (``kept.py``):
                               the loss is the same, its gradient differs by what rounding the states makes

None is part of what a run is: a run may go on with other ones.
"""

from typing import Literal

import jax

from hope_jax.context.schedule import learns_in_context
from hope_jax.errors import UserError, check_word
from hope_jax.kept import RematStates
from hope_jax.memory.kernels import runs_kernel
from hope_jax.models import LanguageModel, ModelConfig, has_memory, impls

Remat = Literal["auto", "none", "block", "nested"]
"""auto, without ``remat_every``: "nested" on a TPU, "block" on other accelerators. Else "none"."""
KEPT = {
    "none": "all that blocks compute",
    "block": "the input of every block",
    "nested": "the input of every block, states of memories before every few chunks where that halves them",
}


def chosen_remat(remat: Remat, remat_every: int | None, platform: str | None = None) -> Remat:
    """What "auto" is here; other words as they are. Raises UserError for an unknown word.

    ``platform``: of the devices that train, as JAX calls it; None: this machine's.
    """
    check_word("remat", remat, Remat)
    if remat != "auto":
        return remat
    platform = jax.default_backend() if platform is None else platform
    if platform == "cpu" or remat_every is not None:
        return "none"
    return "nested" if platform == "tpu" else "block"


def what_is_kept(model: ModelConfig, remat: Remat, remat_every: int | None, platform: str) -> str:
    """What the backward pass of training keeps, in words, with the word that ``remat`` is for this model here."""
    word = chosen_remat(remat, remat_every, platform)
    if word == "nested" and not has_memory(model):
        word = "block"
    pieces = "" if remat_every is None else f", of pieces of {remat_every} tokens"
    return f"{word}: {KEPT[word]}{pieces}"


def check_states(states: RematStates, model: ModelConfig, remat_every: int | None) -> None:
    """Raise UserError for an unknown word, and for rounded states where a model keeps none, or not in such a loop."""
    check_word("remat_states", states, RematStates)
    if states == "exact":
        return
    if not has_memory(model) and remat_every is None:
        raise UserError("remat_states is 'bfloat16', and no mixer of the model keeps states of a memory; leave it out")
    if any(map(runs_kernel, impls(model))):
        raise UserError("remat_states is 'bfloat16', and kernels (impl 'pallas') keep states on their own; drop one")
    if "sequential" in impls(model):
        raise UserError("remat_states is 'bfloat16', and impl 'sequential' keeps the state of every token; drop one")
    if learns_in_context(LanguageModel(model)):
        raise UserError(
            "remat_states is 'bfloat16', and levels learn in context: training differentiates their writes twice, "
            "rounded states only once; drop one"
        )
